"""KVarN: keys at 4 bits and values at 2, tokens and channels of a page made alike before. arXiv 2606.03458

Rows are rotated by a Hadamard matrix, a tile of 128 tokens of a head is scaled on both sides until its tokens and its
channels have the same variance (16 rounds of Sinkhorn's scaling), and each token gets affine codes. Nothing is learnt.

Departures: the tokens' factors are not stored by themselves, since the affine scale of a token has them; exact sinks
and window as everywhere here, between 32 and 160 recent tokens; 3 and 8 bits are ours. Written from descriptions of the
paper: the scaling's number of rounds is theirs, how its result is rounded is ours (float16).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.sinkhorn import Sinkhorn
from kvshrink.methods._quantiser import Quantiser, Space, Transform, axes
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import hadamard
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import KV

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class KVarN(Quantiser):
    """`bits`-bit keys and `value_bits`-bit values (None: as the keys), after RoPE."""

    bits: int = 4
    value_bits: int | None = 2

    page: ClassVar[int] = 128
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def check(self) -> None:
        super().check()
        one_of("value_bits", self.value_bits, (None, *BITS))

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        return Transform.rotation(hadamard(space.width, space.width).expand(space.groups, -1, -1))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        bits = self.bits if kv == "key" or self.value_bits is None else self.value_bits
        return Sinkhorn(axes(space, bits, "token", space.width))


METHOD = KVarN
