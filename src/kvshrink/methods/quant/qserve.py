"""QServe's KV4: one scale a token and head, keys smoothed by SmoothAttention. arXiv 2405.04532

Keys have some channels of large numbers in every token. Dividing channel i by lambda_i = max |K_i|^alpha, and
multiplying the query, leaves scores as they are and rows even. The two channels of a RoPE pair share a lambda, as the
paper folds it into weights before RoPE. alpha is the best of 0, 1/20, .. 1 for the scores. Values are rotated
(Hadamard), as the paper rotates the input of the output projection. 4 bits and one scale and minimum for a head of 128:
4.25 bits.

Departures: alpha is chosen for each layer by the error of scores, not of the layer's output; the zero point is a float
minimum (the paper rounds -15 min / (max - min)); sinks and a recent window are exact.
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
from kvshrink.shapes import Float

BITS = (2, 3, 4, 8)
STEPS = 20  # of alpha between 0 and 1


@final
@dataclass(frozen=True)
class QServe(Quantiser):
    """`bits`-bit codes, one scale a token and head; smoothed keys after RoPE, rotated values."""

    bits: int = 4

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        if kv == "value":
            return {}
        packing, most = self.packing(kv, space, {}), largest(stats)
        scales = [most.pow(step / STEPS) for step in range(STEPS + 1)]
        return {"smooth": min(scales, key=lambda scale: stats.cost(packing, Transform.scaled(scale)))}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        if kv == "value":
            return Transform.rotation(rotation(space.width).expand(space.groups, -1, -1))
        return Transform.scaled(learnt["smooth"])

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "token", space.width)


def largest(stats: SideStats) -> Float[Tensor, "G r"]:
    """Largest magnitude of each channel, the same for both of a RoPE pair; 1 where a channel is always 0."""
    most = stats.rows.abs().amax(0)
    if stats.pairs is not None:
        first, second = stats.pairs
        most[:, first] = most[:, second] = torch.maximum(most[:, first], most[:, second])
    return most.where(most > 0, torch.ones_like(most))


METHOD = QServe
