"""Scissorhands: drop the tokens that attention keeps passing over. arXiv 2305.17118

A token counts as passed over by a query that gives it less than an even share, 1 / (tokens seen); the last `history`
queries of a prompt count, then those of every step. Those passed over most often are dropped.

Departures: the paper's counter looks `history` steps back at any time, here it adds up after the prompt; every layer
has the same budget; the recent tokens are the window; whole pages of 32 go when a page leaves the window.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence, Reduce
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.shapes import Float, Int


@final
@dataclass(frozen=True)
class PassedOver(Scorer):
    """How seldom queries passed a token over."""

    history: int
    keeps: ClassVar[Keeps] = "sum"
    reduce: ClassVar[Reduce | None] = "below"

    def queries(self, count: int) -> Int[Tensor, " x"]:
        return torch.arange(max(0, count - self.history), count)

    def of_stored(self, got: Float[Tensor, "b h slots"]) -> Float[Tensor, "b h slots"]:
        return -got

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        return -seen.got


@final
@dataclass(frozen=True)
class Scissorhands(Evicting):
    """`ratio` of the tokens behind the window, those that the fewest queries passed over."""

    history: int = 256

    def scorer(self, fitted: Fitted) -> Scorer:
        return PassedOver(self.history)

    def check(self) -> None:
        super().check()
        require(self.history >= 1, f"history={self.history}", "Use at least 1 query.")


METHOD = Scissorhands
