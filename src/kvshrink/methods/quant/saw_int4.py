"""SAW-INT4: 4-bit rows after a block Hadamard rotation. arXiv 2604.19157

The plainest of the rotated quantisers: each row of a head is rotated, so that no channel is an outlier, and gets one
scale and one minimum for each `group` channels. Nothing is learnt; the rotation folds into the query and the output.

Departures: pages and exact sinks and window as everywhere here; scale and minimum are float16.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._packing import Packing
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import hadamard
from kvshrink.methods._settings import require
from kvshrink.methods.quant._quantiser import Change, Quantiser, Side, Space, axes

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class SAWInt4(Quantiser):
    """`bits`-bit codes per token and `group` channels, rotated in blocks of `block` channels, after RoPE."""

    bits: int = 4
    group: int = 128
    block: int = 128

    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple] = BITS

    def check(self) -> None:
        super().check()
        for name in ("group", "block"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "Use at least 1 channel.")

    def change(self, side: Side, space: Space, learnt: Fitted) -> Change:
        return Change.turned(hadamard(space.width, self.block).expand(space.groups, -1, -1))

    def packing(self, side: Side, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "token", self.group)


METHOD = SAWInt4
