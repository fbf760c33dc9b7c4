"""FP8: every number an 8-bit float (E4M3), the baseline of serving engines (no paper).

One float16 scale for a page of a head lets the largest number of the page be 448. Engines take one scale for a whole
tensor, fixed at 1 or from the first tokens, where later tokens that are larger are clipped; a page has its own. Sinks
and a recent window are exact.
"""

from dataclasses import dataclass
from typing import final

from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.float8 import Float8
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import KV


@final
@dataclass(frozen=True)
class FP8(Quantiser):
    """E4M3 keys after RoPE and values, one scale for a page of a head."""

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return Float8(space.groups, space.width, space.page)


METHOD = FP8
