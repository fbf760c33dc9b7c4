"""8-bit floats with 3 bits of mantissa (E4M3), and one scale for a page of a group of heads."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._packing.base import Importance, Packing, Stored, checked, joined, paged, there
from kvshrink.shapes import Bool, Float

E4M3 = torch.float8_e4m3fn


@final
@dataclass(frozen=True)
class Float8(Packing):
    """The page's largest magnitude becomes the format's, 448."""

    groups: int
    width: int
    page: int
    metadata: ClassVar[frozenset[str]] = frozenset({"scale"})

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        pages, real = paged(latent, self.page), there(valid, self.page)
        if real is not None:
            pages = pages.masked_fill(~real, 0.0)
        most = torch.finfo(E4M3).max
        scale = checked((pages.abs().amax((-2, -1)) / most).to(torch.float16))
        step = scale.float().where(scale > 0, torch.ones(()).to(pages))[..., None, None]
        # the rounded scale may be a little small for the largest number
        codes = (pages / step).clamp(-most, most).to(E4M3)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return joined(stored["codes"].view(E4M3).float() * stored["scale"].float()[..., None, None])

    def page_bytes(self) -> int:
        return self.groups * (self.page * self.width + 2)
