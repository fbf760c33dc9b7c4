"""OSCAR: 2-bit rows after a rotation that spreads what attention reads evenly over the channels. arXiv 2605.17757

Keys are rotated into the principal directions R of the queries that read them, values into those of the values that
attention weighs most (a value counts by the mean squared score of its key). There a Hadamard matrix H spreads every
direction over all channels, and P orders them by bit reversal: rows x R H P. Each row of a head is rounded about the
middle of its range, of which `key_clip` and `value_clip` are covered. All of it folds into the query and the output.

Departures: each KV head has its own rotation (the paper shares one in a layer unless experts are mixed); Hadamard
blocks where a head is no power of two; some 2,000 tokens spread over the calibration text, its first ones among them,
instead of 30,000 behind a warm-up; pages, and 256 to 288 recent tokens instead of 256.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._packing import Affine, Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import hadamard
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV
from kvshrink.shapes import Float

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class OSCAR(Quantiser):
    """`bits`-bit rows, one scale a token and head, after a calibrated rotation; many exact sinks and recent tokens."""

    window: int = 256
    sinks: int = 64
    bits: int = 2
    key_clip: float = 0.96
    value_clip: float = 0.92

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def check(self) -> None:
        super().check()
        for name in ("key_clip", "value_clip"):
            require(0 < getattr(self, name) <= 1, f"{name}={getattr(self, name)}", "Use a share of the range, up to 1.")

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        if kv == "key":
            read = stats.metric
        else:
            weighed = stats.rows * (stats.energy / stats.energy.mean(0).clamp_min(1e-30))[:, :, None]
            read = torch.einsum("mgc,mgd->gcd", weighed, stats.rows)
        directions = torch.linalg.eigh(read.double()).eigenvectors.flip(-1).float()
        return {"rotation": directions @ spread(space.width).to(directions)}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        return Transform.rotation(learnt["rotation"])

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        clip = self.key_clip if kv == "key" else self.value_clip
        return Affine(space.groups, space.width, space.page, self.bits, "token", space.width, clip)


@cache
def spread(size: int) -> Float[Tensor, "size size"]:
    """H P: Hadamard, then channels in bit-reversed order."""
    digits = max(1, (size - 1).bit_length())
    order = sorted(range(size), key=lambda i: int(f"{i:0{digits}b}"[::-1], 2))
    return hadamard(size, size)[:, order]


METHOD = OSCAR
