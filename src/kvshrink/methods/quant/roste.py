"""RoSTE: rotate a layer only where that makes its rounding error smaller. arXiv 2502.09003

The KV part of a method that fine-tunes a 4-bit model: for each layer, and for keys and values apart, a Hadamard
rotation is on or off, whichever loses less; 4-bit codes per token of a head. Where this library trains through rounding
is `CSKV(codec="rtn", qat=True, steps=...)`.

Departures: the choice is by the error of scores and of the layer's output on calibration rows, not by that of the
weights and activations of a training step; keys are rotated after RoPE, where the rotation folds into the query; float
minimum; exact window and sinks; the straight-through training itself is not part of a cache.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform, axes
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import rotation
from kvshrink.methods._stats import KV

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class RoSTE(Quantiser):
    """`bits`-bit codes, one scale a token and head, rotated where that helps."""

    bits: int = 4

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        packing = self.packing(kv, space, {})
        rotated, plain = stats.cost(packing, _rotation(space, stats.rows)), stats.cost(packing)
        return {"rotated": torch.tensor(rotated < plain)}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform | None:
        return _rotation(space, learnt["rotated"]) if bool(learnt["rotated"]) else None

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "token", space.width)


def _rotation(space: Space, like: Tensor) -> Transform:
    return Transform.rotation(rotation(space.width).to(like.device).expand(space.groups, -1, -1))


METHOD = RoSTE
