"""Keys and values of each KV head quantised as they are: no change of basis, keys after RoPE. Shared by `quant`."""

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from kvshrink.kernels.latents import Packed
from kvshrink.methods._packing import Packing
from kvshrink.methods._roles import Codec, Stored
from kvshrink.shapes import Bool, Float, Int


@final
@dataclass(frozen=True)
class HeadwiseCodec(Codec):
    """Rows of each KV head quantised as they are: one group per head, no change of basis."""

    site: Literal["k_pre", "k_post", "v"]
    packing: Packing

    @property
    def side(self) -> frozenset[str]:  # type: ignore[override]
        return self.packing.side

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.packing.width

    def encode(self, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        return self.packing.store(rows, valid)

    @property
    def salient(self) -> bool:
        return self.packing.salient

    def encode_by_worth(
        self, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None, worth: Float[Tensor, "b h t"]
    ) -> Stored:
        return self.packing.store_by_worth(rows, valid, worth)

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        return self.packing.pick(stored, tokens)

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.packing.load(stored)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return latent

    def packed(self, stored: Stored) -> Packed | None:
        return self.packing.packed(stored)

    def demoted(self, stored: Stored) -> Stored:
        return self.packing.demoted(stored)

    def page_bytes(self) -> int:
        return self.packing.page_bytes()
