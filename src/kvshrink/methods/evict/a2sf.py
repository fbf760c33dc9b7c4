"""A2SF: heavy hitters whose past fades, so that a token is not held for having come early. arXiv 2407.20485

As H2O, but a query's attention counts `decay` for each token since: importance is sum over queries q of
decay^(n - 1 - q) P[q, i]. While decoding what a token has fades with each step.

Departures: as H2O's. The paper evicts once, after the prompt; `schedule="prompt"` does so here.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.shapes import Float, Int

LEAST = 1e-9  # of a query's weight; older ones are not asked


@final
@dataclass(frozen=True)
class Fading(Scorer):
    """The attention of all queries, added up, each times alpha for every token after it."""

    alpha: float
    keeps: ClassVar[Keeps] = "sum"

    @property
    def decay(self) -> float:
        return self.alpha

    def queries(self, count: int) -> Int[Tensor, " x"]:
        ages = torch.arange(count - 1, -1, -1)
        return torch.arange(count)[self.alpha**ages >= LEAST]

    def weights(self, count: int) -> Float[Tensor, " x"]:
        return self.alpha ** (count - 1 - self.queries(count)).float()

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        return seen.got


@final
@dataclass(frozen=True)
class A2SF(Evicting):
    """`ratio` of the tokens behind the window, those that got most attention of late."""

    decay: float = 0.95

    def scorer(self, fitted: Fitted) -> Scorer:
        return Fading(self.decay)

    def check(self) -> None:
        super().check()
        require(0 < self.decay <= 1, f"decay={self.decay}", "Use a factor above 0, up to 1.")


METHOD = A2SF
