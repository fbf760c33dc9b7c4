"""SnapKV: keep what the end of the prompt looks at. arXiv 2404.14469

The last `observed` queries of a prompt vote: a token's importance is the attention they pay it, averaged over them,
summed over the query heads of its KV head, then averaged over `pool` neighbouring tokens, so that a find comes with its
surroundings. Each KV head keeps its own tokens, all heads as many.

Departures: what is kept is a share of the tokens behind the window, in whole pages of 32; the window is as always 32 to
63 tokens, and the first 4 are exact too. A prompt in chunks is judged chunk by chunk, stored tokens by what they once
got. The paper evicts nothing while decoding; here a page that leaves the window is judged by the query at hand, and the
share holds at any length.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.shapes import Float, Int


@final
@dataclass(frozen=True)
class Observed(Scorer):
    """The last queries of a step, pooled over `pool` tokens."""

    last: int
    pool: int

    def queries(self, count: int) -> Int[Tensor, " x"]:
        return torch.arange(max(0, count - self.last), count)

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        real = seen.real[:, None].float()  # what is no token is no neighbour
        both = torch.cat([seen.mean_mass * real, real], 1)
        sums = torch.nn.functional.avg_pool1d(both, self.pool, 1, self.pool // 2)
        found: Tensor = sums[:, :-1] / sums[:, -1:].clamp_min(1e-6)
        return found


@final
@dataclass(frozen=True)
class SnapKV(Evicting):
    """`ratio` of the tokens behind the window, those that the last `observed` queries look at."""

    observed: int = 32
    pool: int = 7

    def scorer(self, fitted: Fitted) -> Scorer:
        return Observed(self.observed, self.pool)

    def check(self) -> None:
        super().check()
        require(self.observed >= 1, f"observed={self.observed}", "Use at least 1 query.")
        require(self.pool >= 1 and self.pool % 2 == 1, f"pool={self.pool}", "Use an odd number of tokens.")


METHOD = SnapKV
