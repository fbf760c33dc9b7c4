"""NVFP4's layout: 4-bit floats, an 8-bit float scale for 16 channels. The baseline of 4-bit hardware (no paper).

A number is one of 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign (E2M1); 16 channels of a token share an E4M3 scale, which
counts in multiples of one float32 for a page of a head: 4.5 bits. Keys may be rotated in blocks of 16 (`rotate`), as
serving engines do where accuracy falls; it folds into the query.

Departures: hardware keeps the float32 once for a whole tensor, where later tokens would be clipped; sinks and a recent
window are exact.
"""

from dataclasses import dataclass
from typing import final

import torch

from kvshrink.methods._packing import Codebook, Packing
from kvshrink.methods._quantiser import Quantiser, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import hadamard
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

GROUP = 16
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@final
@dataclass(frozen=True)
class NVFP4(Quantiser):
    """E2M1 numbers with a scale for 16 channels of a token, after RoPE. rotate: keys in blocks of 16 channels first."""

    rotate: bool = False

    def check(self) -> None:
        super().check()
        require(isinstance(self.rotate, bool), f"rotate={self.rotate!r}", "Use True or False.")

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform | None:
        if kv == "value" or not self.rotate:
            return None
        return Transform.rotation(hadamard(space.width, GROUP).expand(space.groups, -1, -1))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        levels = torch.tensor([-m for m in reversed(MAGNITUDES)] + list(MAGNITUDES))
        group = min(GROUP, space.width)
        return Codebook(space.groups, space.width, space.page, levels, "token", group, "absmax", "nested")


METHOD = NVFP4
