"""Packing: how rows of numbers lie in pages, and what every form of it shares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.kernels.latents import Packed
from kvshrink.shapes import Bool, Float, Int

Stored = Mapping[str, Tensor]  # every tensor is [b, p, ...]
Importance = Float[Tensor, "b h t"] | None  # of tokens, by KV head; None: all alike

METADATA_BYTES = 4  # float16 scale and float16 low


class MovesSlots(ABC):
    """A page's slots do not depend on each other, so that stored tokens may move to other pages, bit for bit."""

    @abstractmethod
    def moved(self, stored: Stored, index: Int[Tensor, "b G k"]) -> Stored:
        """Whole pages made of the slots `index` of stored ones."""


class Packing(ABC):
    """Rows [b, G, t, r] of whole pages <-> stored tensors [b, p, ...].

    groups, width, page: G, r and tokens of a page. metadata: names of what is no payload.
    """

    if TYPE_CHECKING:  # read only, so that they may be fields of a dataclass, or properties

        @property
        def groups(self) -> int: ...

        @property
        def width(self) -> int: ...

        @property
        def page(self) -> int: ...

    else:
        groups: int
        width: int
        page: int

    @property
    def metadata(self) -> frozenset[str]:
        return frozenset()

    @abstractmethod
    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        """Whole pages. Invalid rows (left pads) may hold anything. Raises DataError on what is not finite.

        importance: of the tokens, for a packing that needs it. Groups are of neighbouring KV heads.
        """

    @property
    def needs_importance(self) -> bool:
        """Whether `store` looks at the importance of tokens; only then is it computed."""
        return False

    @abstractmethod
    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        """The rows again, float32."""

    @abstractmethod
    def page_bytes(self) -> int:
        """Bytes of one page of all groups, by arithmetic."""

    def packed(self, stored: Stored) -> Packed | None:
        """The same pages as fused kernels read them; None: they cannot."""
        return None

    def truncate(self, stored: Stored) -> Stored:
        """Pages of the next younger tier as this packing stores them: a part of the same tensors."""
        raise NotImplementedError(f"{type(self).__name__} takes over no pages")

    def sound(self, stored: Stored) -> bool:
        """Whether tensors of the right shapes, which come from a file, hold no place outside of what they index."""
        return True

    def lead(self, stored: Stored, width: int) -> Float[Tensor, "b G t w"]:
        """The first `width` channels."""
        return self.load(stored)[..., :width]

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """Some tokens of each row."""
        return self.load(stored).take_along_dim(tokens[:, None, :, None].long(), 2)

    def fake_quantize(self, latent: Float[Tensor, "b G t r"]) -> Float[Tensor, "b G t r"]:
        """What `load(store(latent))` gives, with a straight-through gradient (for quantisation-aware training)."""
        with torch.no_grad():
            rounded = self.load(self.store(latent, None))
        return rounded + (latent - latent.detach())  # in this order the sum is the rounded number itself


Put = Callable[[Tensor, Tensor | None], Stored]  # rows [b, G, t, r] and which tokens are valid, stored


class Around(Packing):
    """A packing around another one, `inner`, whose shape it has.

    Importance is handed on to it. Fused kernels and older tiers do not know what a wrapper adds, so `packed`
    and `truncate` stay as they are for any packing.
    """

    inner: Packing

    @abstractmethod
    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        """As `store`, where `put` is how `inner` stores rows."""

    @property
    def needs_importance(self) -> bool:
        return self.inner.needs_importance

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        return self.store_with(partial(self.inner.store, importance=importance), latent, valid)

    @property
    def drops(self) -> frozenset[type]:
        """What a wrapper adds may be over a page's tokens: they do not move, unless it says how."""
        return frozenset({MovesSlots})

    @property
    def groups(self) -> int:
        return self.inner.groups

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def page(self) -> int:
        return self.inner.page

    @property
    def metadata(self) -> frozenset[str]:
        return self.inner.metadata

    def sound(self, stored: Stored) -> bool:
        return self.inner.sound(stored)


def slots_of(pages: Tensor, index: Int[Tensor, "b G k"]) -> Tensor:
    """Pages [b, p, G, page, ...] made of the slots `index` of other pages."""
    page = pages.shape[3]
    rows = pages.transpose(1, 2).flatten(2, 3)  # [b, G, t, ...]
    index = index.view(*index.shape, *[1] * (rows.dim() - 3)).long()
    moved: Tensor = rows.take_along_dim(index, 2).unflatten(2, (-1, page)).transpose(1, 2)
    return moved


def paged(latent: Float[Tensor, "b G t r"], page: int) -> Float[Tensor, "b p G page r"]:
    found: Tensor = latent.float().unflatten(2, (-1, page)).transpose(1, 2)
    return found


def joined(pages: Float[Tensor, "b p G page r"]) -> Float[Tensor, "b G t r"]:
    return pages.transpose(1, 2).flatten(2, 3)


def there(valid: Bool[Tensor, "b t"] | None, page: int) -> Bool[Tensor, "b p 1 page 1"] | None:
    """Which tokens of each page are real."""
    return None if valid is None else valid.unflatten(1, (-1, page))[:, :, None, :, None]


def checked(metadata: Tensor) -> Tensor:
    """Metadata as it will be stored. Raises DataError unless all of it is finite."""
    if not bool(metadata.isfinite().all()):
        raise DataError(
            f"keys or values are NaN, infinite or beyond {metadata.dtype}'s range. Check the model's activations."
        )
    return metadata
