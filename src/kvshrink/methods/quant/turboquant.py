"""TurboQuant: unit rows, a random rotation, then the best scalar code of a normal number. arXiv 2504.19874

After a random rotation every channel of a unit row of d channels is nearly normal with variance 1 / d, whatever the row
was, so one Lloyd-Max table fits all. Beside the codes a row has one number, its norm: 4.125 bits at 4 and 128 channels.
Nothing is learnt. The rotation folds into the query and the output.

The rotation is a dense one, as in the paper: a Hadamard matrix with random signs would turn a row of one large channel
into numbers of one magnitude, for which the table is wrong.

Departures: the paper's last bit, a sign of a second projection (QJL) that makes products unbiased, is left out, as all
who run it leave it out; sinks and a recent window are exact; no layer is kept at 16 bits.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, final

from torch import Tensor

from kvshrink.kernels.normal.reference import levels
from kvshrink.methods._codecs.basis import orthonormal
from kvshrink.methods._packing import Codebook, Packing
from kvshrink.methods._quantiser import Quantiser, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import KV
from kvshrink.shapes import Float

BITS = (1, 2, 3, 4, 8)
SEED = 0


@final
@dataclass(frozen=True)
class TurboQuant(Quantiser):
    """`bits`-bit Lloyd-Max codes of rotated unit rows, after RoPE."""

    bits: int = 4

    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        return Transform.rotation(_rotation(space.width).expand(space.groups, -1, -1))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        table = levels(self.bits).float()
        return Codebook(space.groups, space.width, space.page, table, "token", space.width, "rms")


@cache
def _rotation(size: int) -> Float[Tensor, "size size"]:
    return orthonormal(1, size, size, SEED)[0].float()


METHOD = TurboQuant
