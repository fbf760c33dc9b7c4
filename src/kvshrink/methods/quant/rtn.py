"""Round to nearest: plain int quantisation of keys and values, the baseline of the quantisation family.

Keys per channel over a page of 32 tokens or per token, after RoPE; values per token over `group` channels of a head.
The axes are KIVI's (arXiv 2402.02750), without its residual scheme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, Space, axes
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV, LayerShape


@final
@dataclass(frozen=True)
class RTN(Quantiser):
    """`bits`-bit keys and values. bits=None stores them as they are: a lossless control."""

    bits: int | None = 4
    key_axis: Literal["channel", "token"] = "channel"
    group: int = 32

    budget_setting: ClassVar[str] = "bits"

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        return {"group": (32, 64, 128), "key_axis": ("channel", "token")}

    def budget_values(self, shape: LayerShape, tokens: int) -> tuple[int | None, ...]:
        return (*sorted(WIDTHS), None)

    def check(self) -> None:
        super().check()
        require(self.bits is None or self.bits in WIDTHS, f"bits={self.bits}", f"Use None or one of {WIDTHS}.")
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, self.key_axis if kv == "key" else "token", self.group)


METHOD = RTN
