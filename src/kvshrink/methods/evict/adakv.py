"""AdaKV: a layer's heads share one budget; those whose attention is spread get more of it. arXiv 2407.11550

Importance is SnapKV's. All heads' tokens compete for the layer's budget, so that a head gets as many tokens as it has
among the most important ones; each keeps at least `floor` of an even share, the paper's safeguard of .2.

Departure: a head's share is a number of whole pages of 32 tokens. Of what rounding down leaves, a page each goes to the
heads that lost most by it, so that a layer holds as many pages as with even shares.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._policy import Budget, Scorer, Uniform
from kvshrink.methods._settings import require
from kvshrink.methods.evict.snapkv import Observed
from kvshrink.shapes import Float, Int


@final
@dataclass(frozen=True)
class Shared(Budget):
    """An even share is `ratio` of the pages that left."""

    ratio: float
    floor: float

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        lanes = importance.shape[1]
        even = Uniform(self.ratio).counts(importance, pages, page)[:, :1]  # tokens of an even share, [b, 1]
        ranks = importance.flatten(1).argsort(-1, descending=True, stable=True).argsort(-1).view_as(importance)
        won = ((ranks < lanes * even[..., None]) & (importance > -torch.inf)).sum(-1)
        share = (self.floor * even + (1 - self.floor) * won * lanes * even / won.sum(-1, keepdim=True).clamp_min(1)) / page
        whole = share.floor()
        spare = (lanes * even // page) - whole.sum(-1, keepdim=True)
        lost = (share - whole).argsort(-1, descending=True, stable=True).argsort(-1)
        return ((whole + (lost < spare)) * page).long()

    def pages(self, left: int, lanes: int) -> int:
        return Uniform(self.ratio).pages(left, lanes)


@final
@dataclass(frozen=True)
class AdaKV(Evicting):
    """`ratio` of the tokens behind the window, over all heads of a layer; at least `floor` of it in each."""

    floor: float = 0.2

    @property
    def scorer(self) -> Scorer:
        return Observed(32, 7)

    @property
    def token_budget(self) -> Budget:
        return Shared(self.ratio, self.floor)

    def check(self) -> None:
        super().check()
        require(0 <= self.floor <= 1, f"floor={self.floor}", "Use a share from 0 to 1.")


METHOD = AdaKV
