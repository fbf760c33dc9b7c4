"""KIVI: 2-bit keys per channel and values per token, the recent tokens exact. arXiv 2402.02750

Keys have few channels of large numbers, so they get one scale per channel over `group` tokens; values have none and get
one per token and `group` channels. Nothing is learnt and nothing is quantised twice. At 2 bits and groups of 32 the
scales are a third of the bytes: 3 bits a number.

Departures from the paper: its `residual` of R = 128 tokens is our `window`, and pages of `group` tokens leave it, so
that between 128 and 160 recent keys and values are exact; the paper keeps 0 to R keys (a block of R is quantised at
once) and exactly R values. Scale and minimum are float16, as in the paper. The fused CPU kernel reads groups of 32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, Space, axes
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import KV, LayerShape

BITS, GROUPS = (2, 4), (32, 64, 128)


@final
@dataclass(frozen=True)
class KIVI(Quantiser):
    """`bits`-bit keys and values, the last `window` tokens (the paper's residual) exact, no sinks.

    group: tokens that share a key channel's scale, and channels that share a value's: 32, 64 or 128.
    """

    window: int = 128
    sinks: int = 0
    bits: int = 2
    group: int = 32

    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        return {"sinks": (0,)}  # the paper has none

    @property
    def page(self) -> int:  # type: ignore[override] # of a class elsewhere, here of a setting
        return self.group  # the paper's one group size

    def check(self) -> None:
        super().check()
        one_of("group", self.group, GROUPS)

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "channel" if kv == "key" else "token", self.group)


METHOD = KIVI
