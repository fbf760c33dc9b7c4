"""SAW-INT4: 4-bit rows after a block Hadamard rotation. arXiv 2604.19157

The plainest of the rotated quantisers: each row of a head is rotated, so that no channel is an outlier, and gets one
scale and one minimum for each `group` channels. Nothing is learnt; the rotation folds into the query and the output.

Departures: pages and exact sinks and window as everywhere here; scale and minimum are float16.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, Space, Transform, axes
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import hadamard
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class SAWInt4(Quantiser):
    """`bits`-bit codes per token and `group` channels, rotated in blocks of `block` channels, after RoPE."""

    bits: int = 4
    group: int = 128
    block: int = 128

    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def check(self) -> None:
        super().check()
        for name in ("group", "block"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "Use at least 1 channel.")

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        return Transform.rotation(hadamard(space.width, self.block).expand(space.groups, -1, -1))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "token", self.group)


METHOD = SAWInt4
