"""A few numbers kept as they are beside another packing: dense and sparse.

Of every vector (a channel over a page's tokens, a token over its channels, or a whole page) the same number of outliers
is taken out, so that bytes can be promised. They are float16 with a place in their vector; the inner packing sees the
mean of what stays instead, so that its range is theirs no longer.

rule says which:
"ends"   half the highest, half the lowest (GEAR, arXiv 2403.05527)
"far"    the farthest from the vector's mean
"large"  the largest magnitudes, of rows that were normalised before (KVQuant, arXiv 2401.18079)
Numbers equal to the first that finds no room are left in, all of them: equal tokens come back equal.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from kvshrink.methods._packing.base import Around, Packing, Put, Stored, checked
from kvshrink.methods._packing.grouping import Axis, Grouping
from kvshrink.shapes import Bool, Float

Rule = Literal["ends", "far", "large"]

SMALL = 256  # numbers of a vector whose places are bytes
MEDIUM = 2**16  # numbers of a vector whose places fit 16 bits
EMPTY = torch.inf  # in a slot for which there was no outlier


@final
@dataclass(frozen=True, eq=False)
class Sparse(Around):
    """`count` outliers of each vector along `axis`, even for "ends"; the rest in `inner`, which must refuse NaN."""

    inner: Packing
    axis: Axis
    count: int
    rule: Rule

    @property
    def metadata(self) -> frozenset[str]:
        return self.inner.metadata | {"places"}

    @cached_property
    def vectors(self) -> Grouping:
        return Grouping(self.axis, self.width, self.page, self.width)

    @property
    def length(self) -> int:
        """Numbers of a vector."""
        return {"channel": self.page, "token": self.width, "page": self.page * self.width}[self.axis]

    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        rows = self.vectors.split(latent)
        real = self.vectors.real(valid, rows)
        if real is not None:
            rows = torch.where(real, rows, 0.0)
        places, full = self._chosen(rows, real)
        numbers = checked(torch.where(full, rows.gather(-1, places), 0.0).to(torch.float16))
        out = _put(torch.zeros_like(rows, dtype=torch.bool), places, full, torch.ones_like(full))
        rest = self.vectors.join(torch.where(out, _middle(rows, ~out if real is None else real & ~out), rows))
        return {
            **put(rest, valid),
            "outliers": torch.where(full, numbers, EMPTY),
            "places": torch.where(full, places, 0).to(self._index),
        }

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        rows = self.vectors.split(self.inner.load(stored))
        numbers = stored["outliers"].float()
        return self.vectors.join(_put(rows, self._places(stored), numbers != EMPTY, numbers))

    def sound(self, stored: Stored) -> bool:
        places = self._places(stored)
        return bool(((places >= 0) & (places < self.length)).all()) and self.inner.sound(stored)

    def _places(self, stored: Stored) -> Tensor:
        places = stored["places"].long()
        return places & 0xFFFF if self._index == torch.int16 else places  # read without a sign

    def page_bytes(self) -> int:
        slots = self.vectors.groups * self.count
        return self.inner.page_bytes() + self.groups * slots * (2 + self._index.itemsize)

    @property
    def _index(self) -> torch.dtype:
        return torch.uint8 if self.length <= SMALL else torch.int16 if self.length <= MEDIUM else torch.int32

    def _chosen(self, rows: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(place, whether there is an outlier) of each slot, [.., count]."""
        if self.rule == "ends":
            pairs = [_top(rows * sign, real, self.count // 2) for sign in (1.0, -1.0)]
            return torch.cat([p for p, _ in pairs], -1), torch.cat([f for _, f in pairs], -1)
        if self.rule == "large":
            return _top(rows.abs(), real, self.count)
        there = rows.shape[-1] if real is None else real.sum(-1, keepdim=True).clamp_min(1)
        return _top((rows - rows.sum(-1, keepdim=True) / there).abs(), real, self.count)


def sparse(inner: Packing, axis: Axis, share: float, rule: Rule) -> Packing:
    """Sparse of a share of all numbers, the same count of every vector; the inner packing where that rounds to none."""
    length = Sparse(inner, axis, 0, rule).length
    count = 2 * round(share / 2 * length) if rule == "ends" else round(share * length)
    return Sparse(inner, axis, count, rule) if count else inner


def _top(size: Tensor, real: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Places of the `count` largest, and which of them are larger than all others and no pads."""
    if real is not None:
        size = torch.where(real, size, -torch.inf)
    found = size.topk(count + 1)
    return found.indices[..., :count], found.values[..., :count] > found.values[..., count:]


def _put(rows: Tensor, places: Tensor, full: Tensor, numbers: Tensor) -> Tensor:
    """Rows with numbers at their places; those of empty slots go to one place more, which is cut off again."""
    room = torch.nn.functional.pad(rows, (0, 1))
    return room.scatter(-1, torch.where(full, places, rows.shape[-1]), numbers.to(rows.dtype))[..., :-1]


def _middle(rows: Tensor, rest: Tensor) -> Tensor:
    """The mean of the rest of each vector, [.., 1], which rounding must not take out of its range."""
    mean = torch.where(rest, rows, 0.0).sum(-1, keepdim=True) / rest.sum(-1, keepdim=True).clamp_min(1)
    low, high = (torch.where(rest, rows, e).aminmax(dim=-1, keepdim=True) for e in (torch.inf, -torch.inf))
    return torch.where(rest.any(-1, keepdim=True), mean.clamp(low.min, high.max), 0.0)
