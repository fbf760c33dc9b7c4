"""AdaKV: a layer's heads share one budget; those whose attention is spread get more of it. arXiv 2407.11550

Importance is SnapKV's. All heads' tokens compete for the layer's budget: a head gets as many as it has among the most
important ones, and `floor` of an even share at least, the paper's safeguard of .2. `floor` does the same for any other
method that ranks tokens. Departure: shares are whole pages of 32 tokens; what rounding down leaves goes to the heads
that lost most, so that a layer holds as many as with even ones.
"""

from dataclasses import dataclass, field
from typing import final

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods.evict.snapkv import Observed


@final
@dataclass(frozen=True)
class AdaKV(Evicting):
    """`ratio` of the tokens behind the window, over all heads of a layer; at least `floor` of it in each."""

    floor: float | None = field(default=0.2, kw_only=True)

    def scorer(self, fitted: Fitted) -> Scorer:
        return Observed(last=32, pool=7)


METHOD = AdaKV
