"""Accurate Block Quantization: block floating point, with channels of like size side by side. arXiv 2403.20137

`group` channels of a token share one 8-bit exponent; each number is a signed mantissa of `bits` bits. One large channel
costs its neighbours their bits, so channels of a head are sorted by size (K-sort): 4.25 bits at 4 and 32 channels. The
order folds into the query and the output.

Departures: sorted by the root mean square of calibration rows, not by the norms of the key projection's rows, so that
biases and norms count; the query needs no RoPE of its own order, since keys are sorted after RoPE; values are sorted as
well; the query stays in float32; sinks and a recent window are exact.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._packing import Codebook, Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

BITS = (3, 4, 8)


@final
@dataclass(frozen=True)
class BlockFloat(Quantiser):
    """Signed `bits`-bit mantissas, one 8-bit exponent a token and `group` sorted channels of a head."""

    bits: int = 4
    group: int = 32

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def check(self) -> None:
        super().check()
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        return {"order": stats.rows.square().mean(0).argsort(1, descending=True)}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        return Transform.ordered(learnt["order"])

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        half = 2 ** (self.bits - 1)
        mantissas = torch.arange(-half, half).float()
        group = min(self.group, space.width)
        return Codebook(space.groups, space.width, space.page, mantissas, "token", group, "absmax", "power")


METHOD = BlockFloat
