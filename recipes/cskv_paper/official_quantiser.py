"""The official CSKV quantiser's formula, simulated: to measure what its clamped zero point costs. It saves nothing.

CSKV (arXiv 2409.10593) calls its quantiser asymmetric round to nearest; the released code computes, for each group,

    scale = max(max - min, 1e-5) / (2^bits - 1)          zero = clamp(round(-min / scale), 0, 2^bits - 1)
    code  = clamp(round(x / scale) + zero, 0, 2^bits - 1)          x' = (code - zero) * scale

The clamp of `zero` is what is on trial: where all values of a group have one sign, zero lies outside of the codes, and
clamping it clips the group. Written from that formula alone. Departure: groups are this library's own (a key channel
over a page of 32 tokens, a token's value over up to 64 channels), so that only the formula differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from kvshrink.errors import EvalError
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing import Affine
from kvshrink.methods._packing.base import Importance
from kvshrink.methods._roles import Codec, Fitted, Method, Stored
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.shapes import Bool, Float

LEAST_RANGE = 1e-5


def fake_quantise(x: Float[Tensor, "*rows k"], bits: int, clamped: bool = True) -> Float[Tensor, "*rows k"]:
    """What groups along the last axis decode to. clamped=False leaves `zero` as it is: the same without its fault."""
    top = 2**bits - 1
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(LEAST_RANGE) / top
    zero = (-low / scale).round()
    zero = zero.clamp(0, top) if clamped else zero
    return (((x.float() / scale).round() + zero).clamp(0, top) - zero) * scale


def plain_bits(artifact: Artifact) -> bool:
    """Whether latents are stored as affine codes of a basis, whose error these formulas show."""
    method = artifact.method
    return isinstance(method, CSKV) and method.bits is not None and method.codec is None


def one_sign(x: Float[Tensor, "*rows k"]) -> Bool[Tensor, " *rows"]:
    """Which groups have values of one sign only."""
    low, high = x.aminmax(dim=-1)
    return (low > 0) | (high < 0)


def by_group(
    latent: Float[Tensor, "b G t r"], packing: Affine, change: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b G t r"]:
    """`change`, a function of groups along the last axis, on the groups that a packing makes of latents."""
    return packing.grouping.join(change(packing.grouping.split(latent)))


@final
@dataclass(frozen=True, eq=False)
class OfficialCodec(Codec):
    """Latents of a basis, stored in float32 as the official formula would give them back: simulated, nothing saved."""

    basis: BasisCodec  # its own packing is float32
    groups: Affine  # whose groups are quantised
    metadata = frozenset()

    @property
    def site(self):  # type: ignore[override]
        return self.basis.site

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.basis.width

    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        latent = self.basis.project(rows)
        if valid is not None:
            latent = latent.masked_fill(~valid[:, None, :, None], 0.0)
        quantised = by_group(latent, self.groups, lambda x: fake_quantise(x, self.groups.bits))
        return self.basis.packing.store(quantised, valid)

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.basis.unpack(stored)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return self.basis.expand(latent, heads)

    def page_bytes(self) -> int:
        return self.basis.page_bytes()


@final
@dataclass(frozen=True)
class OfficialCSKV(Method):
    """A fitted CSKV of some bits, read through the official formula. Make it with `official(artifact)`."""

    cskv: CSKV = field(default_factory=lambda: CSKV(bits=4))

    def settings(self) -> dict:
        return {"window": self.window, "sinks": self.sinks, "cskv": self.cskv.settings()}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        # window and sinks are exact in the model's dtype; what is simulated is kept in full precision
        plain = replace(shape, dtype=torch.float32)
        raw = replace(self.cskv, bits=None, qat=False).codecs(plain, fitted)
        own = self.cskv.codecs(shape, fitted)
        key, value = (OfficialCodec(basis, quantised.packing) for basis, quantised in zip(raw, own, strict=True))  # type: ignore
        return key, value


def official(artifact: Artifact) -> Artifact:
    """A fitted CSKV with bits, through the official formula. Raises EvalError for what stores latents otherwise."""
    if not plain_bits(artifact):
        raise EvalError("the official formula is one of CSKV with bits and no codec. Fit cskv with bits=4.")
    assert isinstance(artifact.method, CSKV)
    method = OfficialCSKV(artifact.method.window, artifact.method.sinks, artifact.method)
    return Artifact(method, artifact.layers, artifact.model, artifact.provenance)
