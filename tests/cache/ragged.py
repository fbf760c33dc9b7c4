"""A method whose heads hold different numbers of tokens, by a rule that plain lists can follow."""

import math
from dataclasses import dataclass

import torch

from kvshrink.methods._budgets import Budget
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Scorer

SHARES = (0.6, 0.25)  # of the pages that left, which each head holds


class LastQuery(Scorer):
    """All tokens are alike, so that the first ones stay."""

    def queries(self, count: int) -> torch.Tensor:
        return torch.tensor([count - 1])

    def importance(self, seen: Evidence) -> torch.Tensor:
        return torch.zeros_like(seen.got)


@dataclass(frozen=True)
class ByHead(Budget):
    """A share of the pages that left for each head."""

    def counts(self, importance: torch.Tensor, pages: torch.Tensor, page: int) -> torch.Tensor:
        return torch.tensor([[math.ceil(share * n) * page for share in SHARES] for n in pages.tolist()])

    def pages(self, left: int, lanes: int) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class FirstOfEachHead(Evicting):
    """Heads that hold different numbers of tokens, the first ones."""

    def scorer(self, fitted) -> Scorer:
        return LastQuery()

    def budget(self, ratio, fitted) -> Budget:
        return ByHead()
