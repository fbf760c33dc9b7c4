"""Pages of several smaller pages, for metadata of fewer tokens than a correction takes together."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from kvshrink.methods._packing.base import Around, Packing, Put, Stored
from kvshrink.shapes import Bool, Float


@final
@dataclass(frozen=True, eq=False)
class Parts(Around):
    """A page is `count` pages of `inner`, one after the other."""

    inner: Packing
    count: int

    @property
    def page(self) -> int:
        return self.inner.page * self.count

    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        return {k: t.unflatten(1, (-1, self.count)) for k, t in put(latent, valid).items()}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.inner.load({k: t.flatten(1, 2) for k, t in stored.items()})

    def sound(self, stored: Stored) -> bool:
        return self.inner.sound({k: t.flatten(1, 2) for k, t in stored.items()})

    def page_bytes(self) -> int:
        return self.inner.page_bytes() * self.count
