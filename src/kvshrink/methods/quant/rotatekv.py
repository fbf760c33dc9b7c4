"""RotateKV: 2-bit keys before RoPE, rotated over four heads and reordered. arXiv 2501.16383

Outliers sit in the same channels of neighbouring heads, so a Hadamard matrix over `joint` heads levels them better than
one a head. What unevenness is left lies in fixed channels; these are reordered by their sum over calibration rows, so
that neighbours, which share a scale, are alike. Values get a rotation a head. All of it folds into weights.

Departures: the order of the paper's code (rotate, then reorder), not of its text; 4 sinks of position instead of the
tokens with the largest activations of each layer, and an exact recent window; rows are rotated by a matrix product
where they are rebuilt, not by a fast transform; Hadamard blocks where a size is no power of two; levels are 2^b - 1 at
every b (the official code has b^2 - 1).
"""

from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, final

from torch import Tensor

from kvshrink.methods._packing import Affine, Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._rotate import hadamard
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class RotateKV(Quantiser):
    """`bits`-bit codes per token and `group` channels; keys rotated over `joint` heads (or what of it divides them)."""

    bits: int = 2
    group: int = 128
    joint: int = 4

    needs_fit: ClassVar[bool] = True
    site: ClassVar = "k_pre"
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def check(self) -> None:
        super().check()
        for name in ("group", "joint"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "Use at least 1.")

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        if kv == "value":
            return {}
        rotated = self._rotation(kv, space, stats.rows).forward(stats.rows.transpose(0, 1)[None])
        return {"order": rotated[0].sum(1).argsort(1, descending=True)}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        if kv == "value":
            return self._rotation(kv, space, None)
        return self._rotation(kv, space, learnt["order"]).then(Transform.ordered(learnt["order"]))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        groups, width = self._joined(kv, space)
        return Affine(groups, width, space.page, self.bits, "token", min(self.group, width))

    def _joined(self, kv: KV, space: Space) -> tuple[int, int]:
        """(groups, channels of one) after neighbouring heads are taken together."""
        members = gcd(self.joint, space.groups) if kv == "key" and space.heads else 1
        return space.groups // members, space.width * members

    def _rotation(self, kv: KV, space: Space, like: Tensor | None) -> Transform:
        groups, width = self._joined(kv, space)
        matrix = hadamard(width, width)
        return Transform.rotation((matrix if like is None else matrix.to(like.device)).expand(groups, -1, -1))


METHOD = RotateKV
