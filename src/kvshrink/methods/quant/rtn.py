"""Round to nearest: plain int quantisation of keys and values, the baseline of the quantisation family.

Keys per channel over a page of 32 tokens or per token, after RoPE; values per token over `group` channels of a head.
The axes are KIVI's (arXiv 2402.02750), without its residual scheme.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.methods._latents import Affine, Raw, packing
from kvshrink.methods._roles import Codec, Fitted, LayerShape, Method, Stored, require, whole
from kvshrink.shapes import Bool, Float


@final
@dataclass(frozen=True)
class HeadwiseCodec(Codec):
    """Rows of each KV head quantised as they are: one group per head, no change of basis."""

    site: Literal["k_pre", "k_post", "v"]
    packing: Raw | Affine
    side = frozenset({"scale", "low"})

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.packing.width

    def encode(self, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        return self.packing.store(rows, valid)

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.packing.load(stored)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return latent

    def page_bytes(self) -> int:
        return self.packing.page_bytes()


@final
@dataclass(frozen=True)
class RTN(Method):
    """`bits`-bit keys and values. bits=None stores them as they are: a lossless control."""

    bits: int | None = 4
    key_axis: Literal["channel", "token"] = "channel"
    group: int = 32

    dial: ClassVar[str] = "bits"

    def dial_values(self, shape: LayerShape, tokens: int) -> tuple[int | None, ...]:
        return (*sorted(WIDTHS), None)

    def check(self) -> None:
        super().check()
        whole("bits", self.bits)
        whole("group", self.group)
        require(self.bits is None or self.bits in WIDTHS, f"bits={self.bits}", f"Use None or one of {WIDTHS}.")
        require(self.key_axis in ("channel", "token"), f"key_axis={self.key_axis!r}", "Use 'channel' or 'token'.")
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        def packed(axis: str) -> Raw | Affine:
            return packing(shape.heads, shape.head_dim, self.page, self.bits, axis, self.group, shape.dtype)

        return HeadwiseCodec("k_post", packed(self.key_axis)), HeadwiseCodec("v", packed("token"))


METHOD = RTN
