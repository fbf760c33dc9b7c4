"""AdaKV: a layer's heads share one budget; those whose attention is spread get more of it. arXiv 2407.11550

Importance is SnapKV's. All heads' tokens compete for the layer's budget: a head gets as many as it has among the most
important ones, and `floor` of an even share at least, the paper's safeguard of .2. Departure: shares are whole pages of
32 tokens; what rounding down leaves goes to the heads that lost most, so that a layer holds as many as with even ones.
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
class Shared(Uniform):
    """An even share is `ratio` of the pages that left."""

    floor: float

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        lanes, even = importance.shape[1], super().counts(importance, pages, page)[:, :1]
        ranks = importance.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(importance)
        won = ((ranks < lanes * even[..., None]) & (importance > -torch.inf)).sum(-1)
        own = won * lanes * even / won.sum(-1, keepdim=True).clamp_min(1)
        share = (self.floor * even + (1 - self.floor) * own) / page
        whole = share.floor()
        spare = lanes * even // page - whole.sum(-1, keepdim=True)
        lost = (share - whole).argsort(dim=1, descending=True, stable=True).argsort(1)
        return ((whole + (lost < spare)) * page).long()


@final
@dataclass(frozen=True)
class AdaKV(Evicting):
    """`ratio` of the tokens behind the window, over all heads of a layer; at least `floor` of it in each."""

    floor: float = 0.2

    @property
    def scorer(self) -> Scorer:
        return Observed(last=32, pool=7)

    @property
    def token_budget(self) -> Budget:
        return Shared(self.ratio, self.floor)

    def check(self) -> None:
        super().check()
        require(0 <= self.floor <= 1, f"floor={self.floor}", "Use a share from 0 to 1.")


METHOD = AdaKV
