"""The pages of a layer, lane by lane: a table of records, how many of their slots are filled, and with which tokens.

A lane is one row of the batch times one group of KV heads that share a latent: 1 or more lanes a row, each with a
timeline of its own. A token's column here is its number in its own row, counted from the row's first token.

`Pages` is a value: a change makes another one, which shares the records. So what a step reads stays as it was while the
step adds tokens, and a fork copies a table. Rows may hold different numbers of pages, lanes of a row too: tables are as
wide as the longest, with zeros behind the others' ends.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvshrink.kernels.records import Holder, Layout, Pieces, Records
from kvshrink.shapes import Float, Int, UInt8
from kvshrink.store.bytes import nbytes
from kvshrink.store.pool import Places, Run, addressed, trimmed

Stored = Mapping[str, Tensor]  # pages as codecs give them: every tensor is [b, p, ...]


class Span(NamedTuple):
    """Columns that pages cover without a gap, the same in every row and lane."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Pages(Holder):
    """Pages of `page` tokens. table: addresses, int64 [b, L, n], 0 where a lane has no such page; used: slots filled,
    uint8 [b, L, n]; first: column of each page's first slot, int32 [b, n].

    columns: of every slot, -1 if none, where a lane's tokens do not follow each other; None: they do, in each page.
    columns_of: makes them, where a step seldom asks.
    importance: of every slot's token, beside `columns`.
    """

    page: int
    lanes: int
    table: np.ndarray
    used: np.ndarray
    first: np.ndarray
    layout: Layout | None = None
    runs: tuple[Run, ...] = ()
    columns: Int[Tensor, "b L slots"] | None = None
    importance: Float[Tensor, "b L slots"] | None = None
    columns_of: Callable[[], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled: places in runs, since addresses are another process's."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"runs": tuple(self._places.runs), "table": self._numbered() if self.runs else self.table}

    def __setstate__(self, own: dict[str, Any]) -> None:
        if runs := own["runs"]:
            own = own | {"table": addressed(runs, *own["table"])}
        vars(self).update(own)

    def _numbered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(which of the sorted runs, which record of it, whether there is one) of each entry of the table."""
        there = self.table != 0
        return *self._places.of(np.where(there, self.table, self.table.max(initial=0))), there

    @classmethod
    def none(cls, page: int, lanes: int = 1, rows: int = 0) -> "Pages":
        shape = (rows, lanes, 0)
        return cls(page, lanes, np.zeros(shape, np.int64), np.zeros(shape, np.uint8), np.zeros((rows, 0), np.int32))

    def for_rows(self, rows: int) -> "Pages":
        """The same; where there are no pages, those of so many rows."""
        return self if len(self) and len(self.table) == rows else Pages.none(self.page, self.lanes, rows)

    # --- what is there ---

    def __len__(self) -> int:
        """Pages of the longest lane."""
        return int(self.table.shape[2])

    @cached_property
    def counts(self) -> np.ndarray:
        """Pages of each lane, [b, L]."""
        return np.asarray((self.table != 0).sum(2))

    @cached_property
    def even(self) -> bool:
        """Whether all lanes have as many pages."""
        return bool((self.table != 0).all())

    @cached_property
    def full(self) -> bool:
        """Whether every slot of every lane holds a token."""
        return bool((self.used == self.page).all())

    @property
    def chosen(self) -> bool:
        """Whether a lane's tokens were chosen, so that they need not follow each other."""
        return self.columns is not None or self.columns_of is not None

    @cached_property
    def span(self) -> Span | None:
        """The columns, if all rows and lanes hold the same ones without a gap."""
        if self.chosen or not len(self) or not self.full or not self.even:
            return None
        start = int(self.first[0, 0])
        right = start + self.page * np.arange(len(self))
        return Span(start, start + len(self) * self.page) if (self.first == right).all() else None

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of each lane, [b, L]."""
        return np.asarray(self.used.sum(2, dtype=np.int64))

    @cached_property
    def slots(self) -> Int[Tensor, "b L slots"]:
        """Column of every slot, -1 if it holds no token. On the host, unless `columns` are elsewhere."""
        if self.columns is not None:
            return self.columns
        return self.all_slots() if self.columns_of is None else self.columns_of()

    def all_slots(self) -> Int[Tensor, "b L slots"]:
        """Where columns follow from pages, made anew: columns of every slot."""
        slot = np.arange(self.page)
        found = np.where(slot < self.used[..., None], self.first[:, None, :, None] + slot, -1)
        return torch.from_numpy(found.reshape(*self.table.shape[:2], -1).astype(np.int32))

    def records(self, start: int = 0, stop: int | None = None) -> Records:
        assert self.layout is not None
        return Records(self, self.layout, start, len(self) if stop is None else stop)

    def blocks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of pages, about `tokens` slots of each lane at a time."""
        step = max(1, tokens // self.page)
        yield from ((at, min(at + step, len(self))) for at in range(0, len(self), step))

    # --- as a holder of records ---

    @property
    def device(self) -> torch.device:
        return self.runs[0].data.device

    def bytes_of(self, start: int, stop: int) -> UInt8[Tensor, "b L p size"] | Pieces:
        if (found := self._found.get((start, stop))) is not None:
            return found
        table = self.table[:, :, start:stop]  # any page in place of those that are not there
        table = table if self.even else np.where(table == 0, table.max(), table)
        if not isinstance(found := self._places.find(table), Pieces) or found.order is None:
            self._found[start, stop] = found  # the runs' own memory: each step until the next page asks for the same
        return found

    @cached_property
    def _found(self) -> dict[tuple[int, int], Tensor | Pieces]:
        return {}

    @cached_property
    def _places(self) -> Places:
        return Places(self.runs)

    def addresses(self, start: int, stop: int) -> np.ndarray:
        return self.table if stop - start == len(self) else np.ascontiguousarray(self.table[:, :, start:stop])

    def device_addresses(self, start: int, stop: int) -> Tensor:
        return self._table_on_device[:, :, start:stop].contiguous()

    @cached_property
    def _table_on_device(self) -> Tensor:
        return torch.from_numpy(self.table).to(self.runs[0].data.device)

    # --- changes ---

    def appended(
        self,
        parts: Iterable[Stored],
        pages: int,
        first: np.ndarray,
        used: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> "Pages":
        """With `pages` more pages of some rows (None: all), from parts as they come, as one run.

        first: column of each new page's first slot, [rows, pages]; used: slots filled, [rows, lanes, pages]; None: all.
        """
        count, run, layout, at = len(first), None, self.layout, 0
        for part in parts:
            if run is None:
                layout = Layout.of(part, self.lanes) if layout is None else layout
                run = Run.take(count * self.lanes * pages, layout, next(iter(part.values())).device)
                records = run.data.view(count, self.lanes, pages, layout.size)
            size = next(iter(part.values())).shape[1]
            assert layout is not None
            layout.write(records[:, :, at : at + size], part)
            at += size
        assert run is not None
        assert at == pages, "the parts are not as many pages as were announced"
        addresses = run.addresses().reshape(count, self.lanes, pages)
        used = np.full(addresses.shape, self.page, np.uint8) if used is None else used.astype(np.uint8)
        return replace(self, layout=layout, runs=(*self.runs, run))._placed(addresses, used, first, rows)

    def _placed(self, addresses: np.ndarray, used: np.ndarray, first: np.ndarray, rows: np.ndarray | None) -> "Pages":
        """With these entries behind those that some rows have."""
        first = first.astype(np.int32)
        if rows is None and (self.even or not len(self)):
            own = self if len(self.table) else Pages.none(self.page, self.lanes, len(first))
            return replace(
                self,
                table=np.concatenate([own.table, addresses], 2),
                used=np.concatenate([own.used, used], 2),
                first=np.concatenate([own.first, first], 1),
            )
        rows = np.arange(len(self.table)) if rows is None else rows
        held = self.counts[:, 0] if self.lanes == 1 else self.counts.max(1)
        place = held[rows][:, None] + np.arange(first.shape[1])
        width = max(len(self), int(place.max(initial=-1)) + 1)
        wider = self.widened(width)
        wider.table[rows[:, None], :, place] = addresses.swapaxes(1, 2)
        wider.used[rows[:, None], :, place] = used.swapaxes(1, 2)
        wider.first[rows[:, None], place] = first
        return wider

    def widened(self, width: int) -> "Pages":
        """Arrays of its own, so wide."""
        more = width - len(self)
        return replace(
            self._by_slot(lambda t: torch.nn.functional.pad(t, (0, more * self.page), value=-1)),
            table=np.pad(self.table, ((0, 0), (0, 0), (0, more))),
            used=np.pad(self.used, ((0, 0), (0, 0), (0, more))),
            first=np.pad(self.first, ((0, 0), (0, more))),
        )

    def _by_slot(self, change: Callable[[Tensor], Tensor]) -> "Pages":
        """The same with a change of what is known of every slot."""
        if self.columns is None or self.importance is None:
            return self
        return replace(self, columns=change(self.columns), importance=change(self.importance))

    def narrowed(self) -> "Pages":
        """Without the pages that no lane has any more, and without empty ones."""
        table = np.where(self.used == 0, 0, self.table)
        width = int((table != 0).sum(2).max(initial=0))
        return replace(
            self._by_slot(lambda t: t[..., : width * self.page].contiguous()),
            table=table[..., :width],
            used=self.used[..., :width],
            first=self.first[:, :width],
        )

    def cropped(self, lengths: np.ndarray) -> "Pages":
        """Without the columns from each row's length on; nothing is encoded again."""
        if self.columns is not None:
            length = torch.from_numpy(lengths).to(self.columns.device)
            columns = self.columns.masked_fill(self.columns >= length[:, None, None], -1)
            used = (columns >= 0).unflatten(2, (-1, self.page)).sum(3).cpu().numpy().astype(np.uint8)
            return replace(self, used=used, columns=columns).narrowed()
        used = np.minimum(self.used, np.maximum(0, lengths[:, None] - self.first)[:, None]).astype(np.uint8)
        return replace(self, used=used).narrowed()

    def selected(self, rows: np.ndarray) -> "Pages":
        """These rows, in this order; the same one may come more than once."""
        index = torch.from_numpy(rows)
        return replace(
            self._by_slot(lambda t: t[index.to(t.device)]),
            table=self.table[rows],
            used=self.used[rows],
            first=self.first[rows],
        ).narrowed()

    def trimmed(self, holder: Any) -> "Pages":
        """The same without memory that nobody needs any more."""
        table, runs = trimmed(self.table, self.runs, holder)
        return replace(self, table=table, runs=runs)

    def to(self, device: torch.device | str) -> "Pages":
        """The records elsewhere, each once."""
        moved = [Run(run.data.to(device, non_blocking=True)) for run in self._places.runs]
        table = addressed(moved, *self._numbered()) if moved else self.table
        own = self._by_slot(lambda t: t.to(device, non_blocking=True))
        return replace(own, table=table, runs=tuple(moved))

    # --- bytes ---

    @property
    def index_bytes(self) -> int:
        """Bytes of what says where and which tokens the records are."""
        held = nbytes(t for t in (self.columns, self.importance) if t is not None) + self.made_bytes
        return self.table.nbytes + self.used.nbytes + self.first.nbytes + held

    @property
    def made_bytes(self) -> int:
        """Bytes of what was made of that, once it has been asked for."""
        made = [vars(self).get(name) for name in ("slots", "_table_on_device")]
        return sum(t.nbytes for t in made if t is not None and t is not self.columns)

    def tensors(self) -> list[Tensor]:
        return [run.data for run in self.runs]
