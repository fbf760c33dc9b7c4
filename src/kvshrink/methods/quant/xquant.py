"""XQuant: what keys and values are made of is stored, and they are made again. arXiv 2508.10395

mode "input": of a layer whose query heads each have a KV head, the input x itself, once for keys and values: half of
the numbers. mode "latent": where KV heads are shared x would be the larger, so W^T = U S B^T is taken apart once and
x U is stored, for keys and for values: as many numbers as keys and values have, in the basis in which x has them.
Either is quantised per token over `group` channels, keys before RoPE, all KV heads together.

A cache gets keys, not x, so both are read off keys and values: x U = (k - bias) B S^-1, exactly, and x by least squares
(`_input.py`). mode "auto" takes the input where W has as many rows as columns and the calibration text's keys and
values are products of an input, else the latents. A norm on keys is where they are not: the latents are then of normed
keys, still an exact change of basis, but not the paper's.

Departures: the paper stores x as it enters, which is never rounded to keys first; singular values below FLOOR of the
largest count as that, since keys of 16 bits say nothing about x there; no layer has other bits than another; sinks and
a recent window are exact. Of a layer with inputs the artifact holds 4 hidden^2 numbers in float32.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.kernels.records import record_bytes
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing import Affine, Packing
from kvshrink.methods._quantiser import Quantiser, Space, Transform
from kvshrink.methods._roles import Codec, Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV, KVS, CalibrationStats, LayerShape
from kvshrink.methods.quant._input import InputCodec, recovery, residual

BITS = (2, 3, 4, 8)
FLOOR = 2**-8  # of the largest singular value
CLOSE = 0.02  # residual up to which rows are products of an input, but for their rounding


@final
@dataclass(frozen=True)
class XQuant(Quantiser):
    """`bits`-bit codes of the layer input, or of what the SVD of the projections makes of it."""

    bits: int = 4
    mode: Literal["auto", "input", "latent"] = "auto"
    group: int = 128

    needs_fit: ClassVar[bool] = True
    site: ClassVar[Literal["k_pre", "k_post"]] = "k_pre"
    of_latents: ClassVar[bool] = False  # its basis is the projection's; a low-rank method has its own
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    @property
    def samples(self) -> bool:
        return self.mode != "latent"

    def check(self) -> None:
        super().check()
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")

    def apart(self, fitted: Fitted) -> str | None:
        joint = "down" in fitted if fitted else self.mode != "latent"
        return "may store keys and values as one" if joint else None

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        if self.mode != "latent":
            fits = stats.known("key_weight").shape[0] == stats.known("key_weight").shape[1]
            found = recovery(stats) if fits else {}
            if fits and residual(stats, found) <= CLOSE:
                return found
            if self.mode == "input":
                raise SettingError(
                    f"mode='input' is not possible for keys of {stats.known('key_weight').shape[0]} channels made of "
                    f"{stats.known('key_weight').shape[1]}, or with a norm on keys. Use mode='latent'."
                )
        parts = zip(
            KVS,
            (stats.known("key_weight"), stats.known("value_weight")),
            (stats.key_bias, stats.value_bias),
            strict=True,
        )
        return {f"{kv}_{k}": t for kv, w, bias in parts for k, t in _basis(w, bias).items()}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        basis, scale = learnt["basis"], learnt["scale"]
        return Transform((basis / scale)[None], (basis * scale).T[None], learnt["mean"][None])

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        width = space.groups * space.width
        return Affine(1, width, space.page, self.bits, "token", min(self.group, width))

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        if "down" not in fitted:
            return super().codecs(shape, fitted)
        stored, n = self.packing("key", self._space(shape, "key"), {}), shape.width
        bases = []
        sites: tuple[Literal["k_pre", "v"], ...] = ("k_pre", "v")
        for site, kv, mean in zip(sites, KVS, fitted["mean"].split(n), strict=True):
            up = fitted[f"{kv}_weight"][None]
            unused = up.transpose(1, 2)  # the rows of keys or values alone give no input
            bases.append(BasisCodec(site, unused, up, mean[None], stored))
        key = InputCodec(bases[0], fitted["down"], fitted["mean"])
        return key, InputCodec(bases[1], None, fitted["mean"])

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """Before a fit that has yet to choose, of the larger: the latents."""
        both = super().bits_per_token(shape, fitted)
        return both / 2 if "down" in fitted or (self.mode == "input" and not fitted) else both

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        return pages * record_bytes(int(self.bits_per_token(shape, fitted) * self.page / 8))


def _basis(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """{basis B [n, n], scale S [n], mean [n]} of a projection [n, hidden]."""
    weight = weight.double()
    squares, vectors = torch.linalg.eigh(weight @ weight.T)
    scale = squares.clamp_min(0).sqrt().flip(0)
    scale = scale.clamp_min(float(scale[0]) * FLOOR)
    mean = torch.zeros_like(scale) if bias is None else bias.double()
    return {k: t.float().contiguous() for k, t in (("basis", vectors.flip(1)), ("scale", scale), ("mean", mean))}


METHOD = XQuant
