"""ZipVL: as many tokens as hold `mass` of the attention, found anew for each layer and prompt. arXiv 2410.08584

The last `asked` queries and as many random ones are asked. A layer keeps the fewest tokens whose accumulated attention
is `mass` of all, those with the most attention per query that sees them, the same number in each head.

Departures: the number too is by attention per query that sees a token, not by the sum; tokens are never read at fewer
bits (the paper's first version), they are dropped (its second); the number is in whole pages and at most `ratio` of the
tokens, by which bytes are promised: what is held may be less.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._budgets import Budget, Mass
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import SEED, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.shapes import Float, Int


@final
@dataclass(frozen=True)
class Probed(Scorer):
    """Normalised attention of the last and some random queries."""

    asked: int

    def queries(self, count: int) -> Int[Tensor, " x"]:
        last = min(self.asked, count)
        rest = torch.randperm(count - last, generator=torch.Generator().manual_seed(SEED))[: self.asked]
        return torch.cat([rest, torch.arange(count - last, count)]).sort().values

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        return seen.mean_mass


@final
@dataclass(frozen=True)
class ZipVL(Evicting):
    """The tokens behind the window that hold `mass` of the attention, at most `ratio` of them."""

    ratio: float = 0.5
    mass: float = 0.975
    asked: int = 64

    def scorer(self, fitted: Fitted) -> Scorer:
        return Probed(self.asked)

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        return Mass(ratio, self.mass)

    def check(self) -> None:
        super().check()
        require(0 < self.mass <= 1, f"mass={self.mass}", "Use a share of attention above 0, up to 1.")
        require(self.asked >= 1, f"asked={self.asked}", "Use at least 1 query.")
        other = self.most is None and self.floor is None
        require(other, f"mass={self.mass} beside most or floor", "Leave them out: the mass says how many stay.")


METHOD = ZipVL
