"""LagKV: a token stays if its key and value stand out against those that follow. arXiv 2504.04704

Tokens behind the sinks are taken in partitions of `lag`. Keys, and values, of a partition are scaled by the minimum and
the maximum of each channel in the next one; a token's score is the standard deviation of its scaled channels, softmax
over the partition, the mean of keys and values. Importance is the rank within the partition, so that all partitions
keep alike. No query is asked.

Departures: where less than a partition follows, as while decoding, what follows is the reference; the last partition's
is the window, which stays and is judged when it leaves; whole pages of 32 go.
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
from kvshrink.shapes import Float


@final
@dataclass(frozen=True)
class Lagged(Scorer):
    """Rank of each token among `lag` neighbours, 0 to 1."""

    lag: int
    sinks: int
    window: int
    asks: ClassVar[bool] = False

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        found = torch.ones(seen.keys.shape[:3], device=seen.keys.device)
        for row, real in enumerate(seen.real):
            own = real.nonzero()[:, 0]  # neither pads nor sinks are in a partition
            own = own[seen.counted[row, own] >= self.sinks]
            keys, values = (x[row, :, own].float() for x in (seen.keys, seen.values))
            found[row, :, own] = self._ranks(keys, values)
        return found

    def _ranks(self, keys: Float[Tensor, "h n d"], values: Float[Tensor, "h n e"]) -> Float[Tensor, "h n"]:
        """Of the tokens of one row."""
        n = keys.shape[1]
        found = torch.ones(keys.shape[:2], device=keys.device)
        for start in range(0, n, self.lag):
            stop = min(start + self.lag, n)
            if stop == n:  # nothing follows but the window, which stays
                stop = max(start, n - self.window)
            if stop <= start or stop == n:
                break
            own, after = slice(start, stop), slice(stop, min(stop + self.lag, n))
            score = _spread(keys[:, own], keys[:, after]) + _spread(values[:, own], values[:, after])
            rank = score.argsort(dim=-1, stable=True).argsort(-1)
            found[:, own] = (rank + 1) / rank.shape[-1]
        return found


def _spread(rows: Float[Tensor, "h n d"], after: Float[Tensor, "h m d"]) -> Float[Tensor, "h n"]:
    """Softmax over these rows of the deviation of their channels, scaled by what comes after."""
    low, high = after.amin(1, keepdim=True), after.amax(1, keepdim=True)
    scaled = (rows - low) / (high - low).clamp_min(1e-6)
    return scaled.std(-1).nan_to_num(0.0, 0.0, 0.0).softmax(-1)


@final
@dataclass(frozen=True)
class LagKV(Evicting):
    """`ratio` of the tokens behind the window, in every `lag` of them those that stand out."""

    lag: int = 128

    def scorer(self, fitted: Fitted) -> Scorer:
        return Lagged(self.lag, self.sinks, self.window)

    def check(self) -> None:
        super().check()
        require(self.lag >= 2, f"lag={self.lag}", "Use at least 2 tokens.")


METHOD = LagKV
