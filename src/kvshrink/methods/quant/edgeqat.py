"""EdgeQAT's token importance: the half of the tokens that attention reads least at 4 bits, the others at 8.
arXiv 2402.10787

Codes are affine, per token over a head's channels. Only this part of EdgeQAT is a way to store a cache: the rest of the
paper trains a small model, its weights and activations quantised, on the entropy and the distribution of its queries
and keys, and is not here.

Departures: the half is that of each page of 32 tokens, not of the sequence; importance is the normalised attention of
some probes (methods/_policy.py), as ZipCache's; nothing is trained; exact window and sinks.
A prompt in chunks is judged chunk by chunk, so that what is chosen depends on them.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import KV, LayerShape
from kvshrink.methods.quant._classes import check_order, check_share, classes, shares

BITS = (8, 4, 3, 2)


@final
@dataclass(frozen=True)
class EdgeQAT(Quantiser):
    """`high` bits for the `share` of the most important tokens, `low` for the others, per token, after RoPE."""

    high: int = 8
    low: int = 4
    share: float = 0.5

    budget_setting: ClassVar[str] = "share"

    def budget_values(self, shape: LayerShape, tokens: int) -> tuple[float, ...]:
        return shares(self.page)

    def check(self) -> None:
        super().check()
        one_of("high", self.high, BITS)
        one_of("low", self.low, BITS)
        check_order(self.high, self.low)
        check_share(self.share)

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return classes(space, self.high, self.low, self.share, "token")


METHOD = EdgeQAT
