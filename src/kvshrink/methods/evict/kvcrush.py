"""KVCrush: half of the budget for the heavy hitters, half for tokens that stand for all others. arXiv 2503.00022

A token's sign is a bit for each KV head: whether that head would keep it. Tokens that are no heavy hitters are sorted
by the Hamming distance of their sign to the mean sign, cut into as many buckets as there are places, and one of each
stays. Heavy hitters are SnapKV's. No token is forgotten as a kind, only as one of many alike.

Departures: all heads of a layer hold the same tokens, since a sign is over all heads; the anchor is the mean sign;
signs and buckets are of the tokens at hand, and a token is judged once, when it leaves the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods.evict.snapkv import Observed
from kvshrink.shapes import Bool, Float, Int


@final
@dataclass(frozen=True)
class Crushed(Scorer):
    """2 for heavy hitters, 1 for those that stand for others, 0 for the rest; within each what attention says."""

    ratio: float
    hitters: float
    observed: int
    pool: int

    def queries(self, count: int) -> Int[Tensor, " x"]:
        return torch.arange(max(0, count - self.observed), count)

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        own = Observed(self.observed, self.pool).importance(seen).masked_fill(~seen.real[:, None], 0.0)
        t = own.shape[2]
        keep = (seen.real.sum(1, keepdim=True) * self.ratio).round().clamp_min(1)  # of each row
        places = (keep - (keep * self.hitters).round()).clamp_min(1)
        mean = own.mean(1)  # of all heads
        order = mean.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(t, device=own.device).expand_as(order))
        heavy = rank < keep - places
        signs = own.argsort(dim=-1, descending=True, stable=True).argsort(-1) < keep[:, None]  # [b, h, t]
        stands = representatives(signs, ~heavy & seen.real, [int(n) for n in places])
        fine = mean / mean.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        score = torch.where(heavy, 2.0, torch.where(stands, 1.0, 0.0)) + 0.5 * fine
        return score[:, None].expand_as(own)


def representatives(
    signs: Bool[Tensor, "b h t"], among: Bool[Tensor, "b t"], places: Sequence[int]
) -> Bool[Tensor, "b t"]:
    """One token of each of a row's `places` buckets of tokens with neighbouring distances to the mean sign, the middle
    one."""
    found = torch.zeros_like(among)
    for row in range(len(signs)):
        index = among[row].nonzero()[:, 0]
        if not len(index):
            continue
        own = signs[row, :, index]
        anchor = own.float().mean(1, keepdim=True) >= 0.5
        distance = (own != anchor).sum(0)
        order = index[distance.argsort(stable=True)]
        count = min(places[row], len(order))
        middle = (torch.arange(count, device=order.device) * 2 + 1) * len(order) // (2 * count)
        found[row, order[middle]] = True
    return found


@final
@dataclass(frozen=True)
class KVCrush(Evicting):
    """`ratio` of the tokens behind the window: `hitters` of them the most looked at, the others one of a kind each."""

    hitters: float = 0.5
    observed: int = 32
    pool: int = 7
    by_head: ClassVar[bool] = False

    def scorer(self, fitted: Fitted) -> Scorer:
        return Crushed(self.ratio, self.hitters, self.observed, self.pool)

    def check(self) -> None:
        super().check()
        require(0 <= self.hitters <= 1, f"hitters={self.hitters}", "Use a share from 0 to 1.")
        require(self.observed >= 1, f"observed={self.observed}", "Use at least 1 query.")
        require(self.pool >= 1 and self.pool % 2 == 1, f"pool={self.pool}", "Use an odd number of tokens.")
        require(self.floor is None, f"floor={self.floor}", "All heads hold the same tokens. Leave it out.")


METHOD = KVCrush
