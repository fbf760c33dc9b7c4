"""MiKV: the important tokens at full precision, the others not evicted but kept at few bits. arXiv 2402.18096

Tokens that an eviction method would drop are stored in `low`-bit codes per token, over a head's channels; the important
ones as they are, or at `high` bits. Keys have channels of large numbers, which would take a token's whole range, and so
have queries: a balancer b = sqrt(max |q| / max |k|) per head and channel makes keys k b and queries q / b, of the same
scores and of channels that count alike. It folds into the query.

Departures: the balancer is from a calibration text, not from the prompt (in latents of another method by the queries'
root mean square instead of their maximum); it is after RoPE; importance is the normalised attention of some probes
(methods/_policy.py), not H2O's running sum, and is judged once, when a page leaves the window; `share` is a multiple of
8 of each page's 32 tokens; exact window and sinks. A `share` of 1/4 is our choice.
A prompt in chunks is judged chunk by chunk, so that what is chosen depends on them.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import KV, LayerShape
from kvshrink.methods.quant._classes import check_order, check_share, classes, shares
from kvshrink.shapes import Float

LEAST = 1e-4  # of the largest maximum of a head: a channel that is hardly used must not be blown up


@final
@dataclass(frozen=True)
class MiKV(Quantiser):
    """The `share` most important tokens at `high` bits (None: the model's dtype), the others at `low`, after RoPE."""

    high: int | None = None
    low: int = 2
    share: float = 0.25

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "share"

    def budget_values(self, shape: LayerShape, tokens: int) -> tuple[float, ...]:
        return shares(self.page)

    def check(self) -> None:
        super().check()
        one_of("high", self.high, (None, 8, 4))
        one_of("low", self.low, (4, 3, 2))
        check_order(self.high, self.low)
        check_share(self.share)

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return classes(space, self.high, self.low, self.share, "token")

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        if kv == "value":
            return {}
        largest = stats.weight.sqrt() if stats.max_abs_query is None else stats.max_abs_query
        return {"balancer": (_sound(largest) / _sound(stats.rows.abs().amax(0))).sqrt()}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform | None:
        return Transform.scaled(1 / learnt["balancer"]) if kv == "key" else None


def _sound(largest: Float[Tensor, "G r"]) -> Float[Tensor, "G r"]:
    return largest.clamp_min(1e-30).maximum(largest.amax(1, keepdim=True) * LEAST)


METHOD = MiKV
