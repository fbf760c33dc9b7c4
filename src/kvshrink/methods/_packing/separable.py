"""Channels divided by the root of their largest number before another form stores them: ZipCache's values.

Channels of large numbers then spend less of a token's range, and lose less in it than if they were made all alike.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._packing.base import Around, Packing, Put, Stored, checked, joined, paged, there
from kvshrink.shapes import Bool, Float


@final
@dataclass(frozen=True)
class Separable(Around):
    """x / c as `inner` stores it, c = sqrt(max |x|) over a page's tokens, one float16 a channel, group and page."""

    inner: Packing

    @property
    def metadata(self) -> frozenset[str]:
        return self.inner.metadata | {"gain"}

    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        rows, gain = self._divided(latent, valid)
        return {**put(rows, valid), "gain": gain}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        rows = self.inner.load({k: t for k, t in stored.items() if k != "gain"})
        return joined(paged(rows, self.page) * stored["gain"].float()[:, :, :, None])

    def page_bytes(self) -> int:
        return self.inner.page_bytes() + self.groups * self.width * torch.float16.itemsize

    def _divided(self, latent: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows [b, G, t, r] over c, and c [b, p, G, r] as it is stored. Raises DataError on what is not finite."""
        pages, real = paged(latent, self.page), there(valid, self.page)
        if real is not None:
            pages = pages.masked_fill(~real, 0.0)
        gain = checked(pages.abs().amax(3).sqrt().to(torch.float16))
        step = gain.float()[:, :, :, None]
        return joined(pages / step.where(step > 0, torch.ones_like(step))), gain
