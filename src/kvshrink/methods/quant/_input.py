"""A layer's input stored instead of its keys and values, which are products of it with known weights.

A cache gets keys and values, not the input x, so x is recovered where a page leaves the exact window: the least squares
solution of [k | v] = x [W_k^T | W_v^T] + [b_k | b_v], which has twice as many equations as unknowns where every query
head has its own KV head. With random weights x comes back within 1e-6 of its size from float32 keys and values, and
within a hundredth from bfloat16 ones; trained weights may be of a worse condition. The key codec stores x; the value
codec reads what it stored.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.decode import Basis
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._packing import Packing
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import CalibrationStats
from kvshrink.shapes import Float


@final
@dataclass(frozen=True, eq=False)
class InputCodec(PackedCodec):
    """Keys or values of a stored input. basis: input -> their rows; down: rows of both, centred -> input."""

    basis: BasisCodec
    down: Float[Tensor, "m hidden"] | None  # None: values, which store nothing
    mean: Float[Tensor, " m"]
    joint = True

    @property
    def packing(self) -> Packing:
        return self.basis.packing

    @property
    def site(self) -> Literal["k_pre", "k_post", "v"]:
        return self.basis.site

    @property
    def metadata(self) -> frozenset[str]:
        return self.basis.metadata if self.down is not None else frozenset()

    def to(self, device: torch.device) -> "InputCodec":
        down = None if self.down is None else self.down.to(device)
        return InputCodec(self.basis.to(device), down, self.mean.to(device))

    def project(self, rows: Float[Tensor, "b h t d"]) -> Float[Tensor, "b 1 t hidden"]:
        """The input. rows: of the keys' heads, then the values' heads."""
        assert self.down is not None, "values are stored with the keys"
        flat = rows.transpose(1, 2).flatten(2).float()
        return ((flat - self.mean) @ self.down)[:, None]

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return self.basis.expand(latent, heads)

    @property
    def expansion(self) -> Basis | None:
        return self.basis.expansion

    def page_bytes(self) -> int:
        return self.basis.page_bytes() if self.down is not None else 0


def recovery(stats: CalibrationStats) -> dict[str, Tensor]:
    """{down [2n, hidden], key_weight and value_weight [hidden, n], mean [2n]}, float32.

    Rows of keys or values are x @ weight + mean, and x is (rows of both - mean) @ down.
    """
    weight = torch.cat([stats.known("key_weight"), stats.known("value_weight")]).double()
    none = weight.new_zeros(stats.shape.width)
    biases = [none if b is None else b.double() for b in (stats.key_bias, stats.value_bias)]
    weights = dict(zip(("key_weight", "value_weight"), weight.T.chunk(2, 1), strict=True))
    found = {"down": torch.linalg.pinv(weight).T, "mean": torch.cat(biases), **weights}
    return {k: t.float().contiguous() for k, t in found.items()}


def residual(stats: CalibrationStats, fitted: Fitted) -> float:
    """What of the sample's keys and values, relative to their size, no input gives: a norm on keys leaves a lot."""
    assert stats.sample is not None
    rows = torch.cat([stats.sample.keys_pre_rope.flatten(1), stats.sample.values.flatten(1)], 1) - fitted["mean"]
    up = torch.cat([fitted["key_weight"], fitted["value_weight"]], 1)
    return float((rows @ fitted["down"] @ up - rows).norm() / rows.norm())
