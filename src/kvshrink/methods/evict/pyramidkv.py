"""PyramidKV: SnapKV with more tokens in the first layers and fewer in the last. arXiv 2406.02069

Budgets fall linearly: of L layers the last has 1 / `steepness` of the mean share, the first as much above it as the
last is below; no layer has more than all. Over all layers the mean is `ratio`.

Departure: as SnapKV's; the share is of the tokens behind the window at any length, so that it never falls back to even
budgets for short prompts.
"""

from dataclasses import dataclass, replace
from typing import final

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods.evict.snapkv import Observed


@final
@dataclass(frozen=True)
class PyramidKV(Evicting):
    """`ratio` of the tokens behind the window in the mean of all layers, most in the first."""

    steepness: float = 20.0
    observed: int = 32
    pool: int = 7

    def scorer(self, fitted: Fitted) -> Scorer:
        return Observed(self.observed, self.pool)

    def at_layer(self, index: int, count: int) -> "PyramidKV":
        least = max(self.ratio / self.steepness, 2 * self.ratio - 1)
        most = 2 * self.ratio - least
        return replace(self, ratio=most - index * (most - least) / max(1, count - 1) if count > 1 else self.ratio)

    def check(self) -> None:
        super().check()
        require(self.steepness >= 1, f"steepness={self.steepness}", "Use 1 or more.")
        require(self.observed >= 1, f"observed={self.observed}", "Use at least 1 query.")
        require(self.pool >= 1 and self.pool % 2 == 1, f"pool={self.pool}", "Use an odd number of tokens.")


METHOD = PyramidKV
