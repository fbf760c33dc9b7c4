"""TOVA: what the newest token looks at least goes, by the mean of all heads of a layer. arXiv 2401.06104

All KV heads of a layer hold the same tokens. Importance is what the last query alone says, of stored tokens too.

Departures: tokens go in whole pages of 32 when a page leaves the window, not one in each step; the window and the first
4 tokens stay.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.shapes import Float, Int


@final
class Newest(Scorer):
    """The attention of a step's last query."""

    keeps: ClassVar[Keeps] = "latest"

    def queries(self, count: int) -> Int[Tensor, " x"]:
        return torch.tensor([count - 1])

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        return seen.got


@final
@dataclass(frozen=True)
class TOVA(Evicting):
    """`ratio` of the tokens behind the window, those that the newest one looks at, the same in all heads of a layer."""

    by_head: ClassVar[bool] = False

    def scorer(self, fitted: Fitted) -> Scorer:
        return Newest()


METHOD = TOVA
