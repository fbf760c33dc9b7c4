"""Trellis-coded quantisation: rotated rows, then the trellis code of a normal number, with a gain per page.

Marcellin and Fischer, IEEE Trans. Commun. 38 (1990); of LLM weights in QTIP (arXiv 2406.11235), whose incoherence this
one takes too: a Hadamard rotation with random signs makes all channels of a head alike, so one table fits all. A
channel's 32 tokens in a page are one path (kernels/trellis): 17 to 35 % less squared error than scalar codes of as many
bits. Beside the codes a page has one float16 gain for 16 channels: .03 bits a number. Nothing is learnt, and the
rotation folds into the query and the output.

Departures: QTIP's weights are coded against activations' second moments, keys and values against nothing; its codes
run along a row of a matrix, these along the tokens of a channel; sinks and a recent window are exact.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from kvshrink.kernels.trellis import BITS
from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.mixed import Mixed, group_sizes
from kvshrink.methods._quantiser import Quantiser, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import rotation
from kvshrink.methods._stats import KV


@final
@dataclass(frozen=True)
class TCQ(Quantiser):
    """`bits`-bit trellis codes of rotated rows, after RoPE."""

    bits: int = 3

    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        return Transform.rotation(rotation(space.width).expand(space.groups, -1, -1))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        sizes = group_sizes(space.width)
        return Mixed(sizes, (self.bits,) * len(sizes), space.page, space.groups, "trellis", alike=True)


METHOD = TCQ
