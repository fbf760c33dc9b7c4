"""Stored pages as records: the bytes of one page of one lane lie together, and a table says where each record is.

A lane is one row of the batch times one group of KV heads whose tokens come and go together. A record's layout is the
same for all pages of a store: named tensors one after the other, those of wider numbers first, so that each is aligned.
Kernels read records by their addresses; everything else gets tensors [b, p, G, ...] from them, views where the records
lie in a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvshrink.shapes import Float, Int, UInt8


def record_bytes(count: int) -> int:
    """Bytes of a record whose parts take so many: a multiple of 4, so that numbers of 4 bytes are aligned in all."""
    return -(-count // 4) * 4


class Field(NamedTuple):
    """One tensor of a record: its shape [G / lanes, ...] and where it begins, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def at(self) -> slice:
        """Its bytes in a record."""
        return slice(self.offset, self.offset + self.nbytes)


class Layout(NamedTuple):
    """How a record lies. size: its bytes, as `record_bytes` and the widest number want them; lanes: of a row."""

    fields: Mapping[str, Field]
    size: int
    lanes: int

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], lanes: int = 1) -> "Layout":
        """Of pages [b, p, G, ...]. With one lane, axes from the third on may mean anything."""
        fields, at, widest = {}, 0, 1
        for name, t in sorted(stored.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            shape = tuple(t.shape[2:])
            shape = shape if lanes == 1 else (shape[0] // lanes, *shape[1:])
            fields[name] = Field(t.dtype, shape, at)
            at, widest = at + fields[name].nbytes, max(widest, t.dtype.itemsize)
        return cls(fields, record_bytes(-(-at // widest) * widest), lanes)

    def write(self, records: UInt8[Tensor, "b L p size"], stored: Mapping[str, Tensor]) -> None:
        """Copy pages [b, p, G, ...] into their records."""
        for name, field in self.fields.items():
            t = stored[name][:, None] if self.lanes == 1 else stored[name].unflatten(2, (self.lanes, -1)).movedim(2, 1)
            _typed(field, records[..., field.at]).copy_(t)

    def read(self, name: str, records: "UInt8[Tensor, 'b L p size'] | Pieces") -> Tensor:
        """One tensor [b, p, G, ...] of pages: a view of the records of one lane, a copy of those of several lanes or
        places."""
        field = self.fields[name]
        t = _typed(field, records.read(field.at) if isinstance(records, Pieces) else records[..., field.at])
        return t[:, 0] if self.lanes == 1 else t.movedim(1, 2).flatten(2, 3)


class Pieces(NamedTuple):
    """Records [b, L, p] in several places: of what is read of them no more than that is joined.

    parts: those of each place, and some between them; order: which of all these is which record; None: as they come.
    """

    parts: Sequence[UInt8[Tensor, "m size"]]
    order: Int[Tensor, " n"] | None
    shape: tuple[int, ...]

    def read(self, at: slice) -> UInt8[Tensor, "b L p n"]:
        """These bytes of each record."""
        cut = [part[:, at] for part in self.parts]
        joined = cut[0] if len(cut) == 1 else torch.cat(cut)
        found: Tensor = (joined if self.order is None else joined[self.order]).view(*self.shape, -1)
        return found


class Holder(ABC):
    """Who has the records, of all lanes."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def bytes_of(self, start: int, stop: int) -> UInt8[Tensor, "b L p size"] | Pieces:
        """The pages from `start` to `stop`, some page in place of those that a lane does not have."""

    @abstractmethod
    def addresses(self, start: int, stop: int) -> np.ndarray:
        """Where they are, int64 [b, L, p] on the host, in one piece; 0 for a page that a lane does not have.

        On a GPU each is a multiple of 16, or of the largest power of two that divides a record's size if that is less.
        """

    def device_addresses(self, start: int, stop: int) -> Tensor:
        """The same where the records are."""
        return torch.from_numpy(self.addresses(start, stop)).to(self.device)


@dataclass(frozen=True, eq=False)
class Records(Mapping):  # type: ignore[type-arg] # checkers in tests would read a tensor at every call
    """Pages `start` to `stop` of all lanes. As a mapping: tensors [b, p, G, ...] by the names that begin with `prefix`.

    Where a lane has no such page its address is 0, and a tensor holds some other page in its place.
    """

    holder: Holder
    layout: Layout
    start: int
    stop: int
    prefix: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.layout.read(self.prefix + name, self._bytes)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self.prefix) for n in self.layout.fields if n.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.layout.fields

    def under(self, prefix: str) -> "Records":
        """The tensors whose names begin so, without it."""
        return Records(self.holder, self.layout, self.start, self.stop, self.prefix + prefix)

    @cached_property
    def prepared(self) -> dict[Any, Any]:
        """What kernels worked out of these pages, by a key of theirs: it must not hold the records themselves."""
        return {}

    def field(self, name: str) -> Field:
        return self.layout.fields[self.prefix + name]

    @cached_property
    def _bytes(self) -> UInt8[Tensor, "b L p size"] | Pieces:
        return self.holder.bytes_of(self.start, self.stop)

    @property
    def bytes(self) -> UInt8[Tensor, "b L p size"]:
        """Whole records: a view where they lie evenly, else a copy."""
        own = self._bytes
        return own.read(slice(None)) if isinstance(own, Pieces) else own

    @property
    def addresses(self) -> np.ndarray:
        """Int64 [b, L, p], C-contiguous, on the host."""
        return self.holder.addresses(self.start, self.stop)

    @property
    def device_addresses(self) -> Tensor:
        """The same where the records are."""
        return self.holder.device_addresses(self.start, self.stop)

    @property
    def identity(self) -> tuple[Any, ...]:
        """The same for all pages of one layout."""
        return id(self.layout.fields), self.layout.lanes, self.prefix

    @property
    def lanes(self) -> int:
        return self.layout.lanes

    @property
    def pages(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Single(Holder):
    """A holder of pages given as tensors: one run of records, with a table of its own."""

    records: UInt8[Tensor, "b L p size"]

    @property
    def device(self) -> torch.device:
        return self.records.device

    def bytes_of(self, start: int, stop: int) -> UInt8[Tensor, "b L p size"]:
        return self.records[:, :, start:stop]

    def addresses(self, start: int, stop: int) -> np.ndarray:
        b, lanes, pages, size = self.records.shape
        table = (self.records.data_ptr() or 1) + size * np.arange(b * lanes * pages, dtype=np.int64).reshape(
            b, lanes, pages
        )
        return np.ascontiguousarray(table[:, :, start:stop])


@dataclass(frozen=True, eq=False)
class Rows(Holder):
    """A holder of full keys or values where they are: `page` tokens of a head are a record; the rest is left out."""

    rows: Float[Tensor, "b h t d"]
    page: int

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def bytes_of(self, start: int, stop: int) -> UInt8[Tensor, "b L p size"]:
        part = self.rows[:, :, start * self.page : stop * self.page]
        found: Tensor = part.unflatten(2, (-1, self.page)).flatten(3).contiguous().view(torch.uint8)
        return found

    def addresses(self, start: int, stop: int) -> np.ndarray:
        b, h, _, d = self.rows.shape
        steps = (self.rows.stride(0), self.rows.stride(1), self.page * d)
        counts = (np.arange(b), np.arange(h), np.arange(start, stop))
        row, head, page = (step * np.asarray(n, np.int64) for step, n in zip(steps, counts, strict=True))
        table = row[:, None, None] + head[:, None] + page
        return self.rows.data_ptr() + self.rows.itemsize * table

    @classmethod
    def records(cls, rows: Float[Tensor, "b h t d"], page: int) -> Records:
        """Under the name "latent"; copied only if a head's tokens do not lie side by side."""
        d = rows.shape[3]
        rows = rows if rows.stride()[2:] == (d, 1) else rows.contiguous()
        layout = Layout({"latent": Field(rows.dtype, (1, page, d), 0)}, page * d * rows.itemsize, rows.shape[1])
        return Records(cls(rows, page), layout, 0, rows.shape[2] // page)


def recorded(stored: Mapping[str, Tensor], lanes: int = 1) -> Records:
    """Pages [b, p, G, ...] copied into records."""
    layout = Layout.of(stored, lanes)
    some = next(iter(stored.values()))
    b, pages = some.shape[:2]
    records = torch.zeros(b, lanes, pages, layout.size, dtype=torch.uint8, device=some.device)
    layout.write(records, stored)
    return Records(Single(records), layout, 0, pages)


def _typed(field: Field, own: UInt8[Tensor, "b L p n"]) -> Tensor:
    """A field's own bytes as [b, L, p, *shape], a view."""
    if field.nbytes == 0:  # torch cannot view bytes that are not there as wider numbers
        return own.new_empty((*own.shape[:3], *field.shape), dtype=field.dtype)
    part = own.view(field.dtype)
    return part.unflatten(-1, field.shape) if field.shape else part[..., 0]
