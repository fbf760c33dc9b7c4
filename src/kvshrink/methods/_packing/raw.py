"""Numbers as they are, in a float dtype."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.kernels.latents import Packed, load
from kvshrink.methods._packing.base import Importance, MovesSlots, Packing, Stored, slots_of
from kvshrink.shapes import Bool, Float, Int


@final
@dataclass(frozen=True)
class Raw(Packing, MovesSlots):
    """Latents stored as floats of `dtype`."""

    groups: int
    width: int
    page: int
    dtype: torch.dtype

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        if valid is not None:
            latent = latent.masked_fill(~valid[:, None, :, None], 0.0)
        data = latent.to(self.dtype)
        if not bool(data.isfinite().all()):
            raise DataError(f"keys or values are NaN or beyond {self.dtype}'s range. Check the model's activations.")
        # a copy even where none is needed for the layout: a view would keep the model's whole tensor alive
        pages = data.unflatten(2, (-1, self.page)).transpose(1, 2)
        return {"latent": pages.clone(memory_format=torch.contiguous_format)}

    def packed(self, stored: Stored) -> Packed:
        return Packed("raw", stored, self.width, self.page)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return load(self.packed(stored))

    def lead(self, stored: Stored, width: int) -> Float[Tensor, "b G t w"]:
        """The first `width` channels, the others unread."""
        return stored["latent"][..., :width].transpose(1, 2).flatten(2, 3).float()

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """Some tokens of each row, the others unread."""
        page, slot = tokens // self.page, tokens % self.page
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
        return stored["latent"][row, page, :, slot].transpose(1, 2).float()

    def moved(self, stored: Stored, index: Int[Tensor, "b G k"]) -> Stored:
        return {"latent": slots_of(stored["latent"], index)}

    def page_bytes(self) -> int:
        return self.page * self.groups * self.width * self.dtype.itemsize

    def fake_quantize(self, latent: Float[Tensor, "b G t r"]) -> Float[Tensor, "b G t r"]:
        """Nothing is lost."""
        return latent
