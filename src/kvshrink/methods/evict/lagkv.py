"""LagKV: a token stays if its key and value stand out against those that follow. arXiv 2504.04704

Tokens behind the sinks are taken in partitions of `lag`. Keys, and values, of a partition are scaled by the minimum and
the maximum of each channel in the next one; a token's score is the standard deviation of its scaled channels, softmax
over the partition, the mean of keys and values. Importance is the rank within the partition, so that all partitions
keep alike. No query is asked.

Departures: where less than a partition follows, as while decoding, what follows is the reference, and the last tokens,
which nothing follows, stay in the window anyway; whole pages of 32 go.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.shapes import Bool, Float


@final
@dataclass(frozen=True)
class Lagged(Scorer):
    """Rank of each token among `lag` neighbours, 0 to 1."""

    lag: int
    asks: ClassVar[bool] = False

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        t = seen.keys.shape[2]
        size = min(self.lag, max(1, t // 2))
        found = torch.ones(seen.keys.shape[:3], device=seen.keys.device)
        for start in range(0, t - 1, size):
            own, after = slice(start, min(start + size, t)), slice(start + size, min(start + 2 * size, t))
            if after.start >= t:
                break
            real = seen.real[:, None, after]
            score = sum(_spread(x[:, :, own].float(), x[:, :, after].float(), real) for x in (seen.keys, seen.values))
            assert isinstance(score, Tensor)
            score = score.masked_fill(~seen.real[:, None, own], -torch.inf)
            rank = score.argsort(dim=-1, stable=True).argsort(-1)
            found[:, :, own] = (rank + 1) / rank.shape[-1]
        return found


def _spread(
    rows: Float[Tensor, "b h n d"], after: Float[Tensor, "b h m d"], real: Bool[Tensor, "b 1 m"]
) -> Float[Tensor, "b h n"]:
    """Softmax over these rows of the deviation of their channels, scaled by what comes after."""
    low = after.masked_fill(~real[..., None], torch.inf).amin(2, keepdim=True)
    high = after.masked_fill(~real[..., None], -torch.inf).amax(2, keepdim=True)
    scaled = (rows - low) / (high - low).clamp_min(1e-6)
    return scaled.std(-1).nan_to_num(0.0, 0.0, 0.0).softmax(-1)


@final
@dataclass(frozen=True)
class LagKV(Evicting):
    """`ratio` of the tokens behind the window, in every `lag` of them those that stand out."""

    lag: int = 128

    def scorer(self, fitted: Fitted) -> Scorer:
        return Lagged(self.lag)

    def check(self) -> None:
        super().check()
        require(self.lag >= 2, f"lag={self.lag}", "Use at least 2 tokens.")


METHOD = LagKV
