"""Keys and values of each KV head quantised as they are: no change of basis, keys after RoPE. Shared by `quant`."""

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from kvshrink.kernels.latents import Packed
from kvshrink.methods._facts import LayerShape
from kvshrink.methods._latents import Affine, Raw, packing
from kvshrink.methods._roles import Codec, Stored
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

    def packed(self, stored: Stored) -> Packed:
        return self.packing.packed(stored)

    def page_bytes(self) -> int:
        return self.packing.page_bytes()


def headwise(
    shape: LayerShape, page: int, bits: int | None, key_axis: Literal["channel", "token"], group: int
) -> tuple[HeadwiseCodec, HeadwiseCodec]:
    """(key codec, value codec): keys per channel over a page or per token, values per token over `group` channels."""

    def packed(axis: str) -> Raw | Affine:
        return packing(shape.heads, shape.head_dim, page, bits, axis, group, shape.dtype)

    return HeadwiseCodec("k_post", packed(key_axis)), HeadwiseCodec("v", packed("token"))
