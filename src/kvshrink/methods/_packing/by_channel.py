"""Two forms in one page: the most important channels in one, the others in another; and rows rotated before they lie.

Which channels of a page those are is one bit a channel, stored once for all tokens of the page.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.methods._packing.base import Around, Importance, Packing, Put, Stored, joined, paged, there
from kvshrink.shapes import Bool, Float, Int
from kvshrink.store.names import under

MASK = "mask"


@final
@dataclass(frozen=True, eq=False)
class ByChannel(Packing):
    """high takes the `high.width` most important channels of each page and group, low the others.

    criterion: "range" (maximum - minimum over the page's tokens) or "size" (mean magnitude).
    """

    high: Packing
    low: Packing
    criterion: Literal["range", "size"]

    @property
    def groups(self) -> int:
        return self.high.groups

    @property
    def page(self) -> int:
        return self.high.page

    @property
    def width(self) -> int:
        return self.high.width + self.low.width

    @property
    def metadata(self) -> frozenset[str]:
        inner = {f"{form}.{name}" for form, p in (("high", self.high), ("low", self.low)) for name in p.metadata}
        return frozenset(inner | {MASK})

    @property
    def needs_importance(self) -> bool:
        return self.high.needs_importance or self.low.needs_importance

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        high, low = (partial(packing.store, importance=importance) for packing in (self.high, self.low))
        return self._store(latent, valid, high, low)

    def _store(self, latent: Tensor, valid: Tensor | None, put_high: Put, put_low: Put) -> Stored:
        pages = paged(latent, self.page)
        best = self._ranked(pages, there(valid, self.page)).argsort(dim=-1, descending=True, stable=True)
        high, low = best.split([self.high.width, self.low.width], -1)
        mask = torch.zeros_like(best, dtype=torch.uint8).scatter_(-1, high, 1)
        stored = {MASK: pack(torch.nn.functional.pad(mask, (0, -self.width % 8)), 1)}
        for form, put, channels in (("high", put_high, high), ("low", put_low, low)):
            part = pages.take_along_dim(channels.sort(-1).values[..., None, :], -1)
            stored |= {f"{form}.{k}": t for k, t in put(joined(part), valid).items()}
        return stored

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        parts = [paged(packing.load(_of(stored, form)), self.page) for form, packing in self._forms()]
        return joined(torch.cat(parts, -1).take_along_dim(self._places(stored)[..., None, :], -1))

    def sound(self, stored: Stored) -> bool:
        right = unpack(stored[MASK], 1)[..., : self.width].sum(-1, dtype=torch.int32) == self.high.width
        return bool(right.all()) and all(packing.sound(_of(stored, form)) for form, packing in self._forms())

    def _forms(self) -> tuple[tuple[str, Packing], tuple[str, Packing]]:
        return ("high.", self.high), ("low.", self.low)

    def page_bytes(self) -> int:
        mask = packed_bytes(self.width + -self.width % 8, 1)
        return self.high.page_bytes() + self.low.page_bytes() + self.groups * mask

    def _ranked(self, pages: Tensor, real: Tensor | None) -> Float[Tensor, "b p G r"]:
        if self.criterion == "size":
            return (pages if real is None else pages.masked_fill(~real, 0.0)).abs().sum(3)
        if real is None:
            return pages.amax(3) - pages.amin(3)
        low, high = (pages.masked_fill(~real, end) for end in (torch.inf, -torch.inf))
        return high.amax(3) - low.amin(3)  # of no real token: all alike

    def _places(self, stored: Stored) -> Int[Tensor, "b p G r"]:
        """Where each channel lies among high's channels, then low's."""
        mask = unpack(stored[MASK], 1)[..., : self.width].long()
        return torch.where(mask > 0, mask.cumsum(-1) - 1, self.high.width + (1 - mask).cumsum(-1) - 1)


def _of(stored: Stored, form: str) -> Stored:
    return under(stored, form)


@final
@dataclass(frozen=True, eq=False)
class Rotated(Around):
    """Rows times an orthogonal matrix, in the form `inner`: for parts of rows, which no change of basis reaches."""

    inner: Packing
    matrix: Float[Tensor, "r r"]

    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        return put(latent.float() @ self.matrix.to(latent.device), valid)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        rows = self.inner.load(stored)
        return rows @ self.matrix.T.to(rows.device)

    def page_bytes(self) -> int:
        return self.inner.page_bytes()
