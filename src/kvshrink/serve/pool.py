"""What attention reads of an engine's pool: records where they lie, exact tokens out of blocks, as one snapshot.

Requests of one step are rows of one batch, whatever their lengths, as joined caches are. What is the same for all
layers of a step is worked out once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.leaving import left
from kvshrink.cache.snapshot import ExactSinks, HeldRows, Hidden, Snapshot, TierView
from kvshrink.kernels.held import Placed, reference
from kvshrink.kernels.held import attend as attend_held
from kvshrink.serve.records import Alike
from kvshrink.shapes import Bool, Float, Int, UInt8
from kvshrink.store.lanes import Pages

Pool = UInt8[Tensor, "blocks 1 n bytes"]  # n records of pages in a block


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolPages(Pages):
    """Pages in blocks of a pool. block, inner: of each page of a row, any where a row has no such page."""

    pool: Tensor
    block: np.ndarray
    inner: np.ndarray
    size: int

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def bytes_of(self, start: int, stop: int) -> UInt8[Tensor, "b 1 p size"]:
        block, inner = (torch.from_numpy(x[:, start:stop]).to(self.device) for x in (self.block, self.inner))
        found = self.pool[block, 0, inner, : self.size][:, None]
        if self.even:
            return found
        # what is not there has a weight of 0, which makes nothing of any number, but not of what is none
        return found.masked_fill(torch.from_numpy(self.table[:, :, start:stop] == 0).to(self.device)[..., None], 0)

    def device_addresses(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self.addresses(start, stop)).to(self.device)


class Reading:
    """Some requests of a step, each of which has `new` tokens that attend to all before them.

    lengths: tokens of each, the new ones included. codes: table [b, blocks] of their blocks of pages, a block being
    `size` tokens. window, page, sinks: of the method. A request of n tokens has (n - window) // page pages.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        new: int,
        codes: np.ndarray,
        size: int,
        window: int,
        page: int,
        sinks: int,
    ) -> None:
        self.length, self.new, self.codes = np.asarray(lengths), new, codes
        self.size, self.window, self.page, self.sinks = size, window, page, sinks
        self.pages = pages_of(self.length - new, window, page)
        own = self.length - self.pages * page  # exact tokens of each
        self.width, self.seen = int(own.max()), int(self.length.max())
        self.starts, self.shifts = self.width - own, self.seen - self.length

    @property
    def rows(self) -> int:
        return len(self.length)

    @cached_property
    def leaving(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, page) of all pages that leave their window in this step."""
        after = pages_of(self.length, self.window, self.page)
        counts = after - self.pages
        row = np.repeat(np.arange(self.rows), counts)
        return row, np.concatenate([np.arange(a, b) for a, b in zip(self.pages, after, strict=True)])

    @cached_property
    def leaving_records(self) -> tuple[Tensor, Tensor]:
        """(block, record in it) where they go."""
        row, number = self.leaving
        block, slot = _of(self.codes[row], number[:, None] * self.page, self.size)
        return block[:, 0], slot[:, 0] // self.page

    @cached_property
    def _records(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block, record in it, whether there is one) of every page, [b, p]."""
        at = np.broadcast_to(np.arange(int(self.pages.max())) * self.page, (self.rows, int(self.pages.max())))
        there = at < self.pages[:, None] * self.page
        block = np.where(there, np.take_along_axis(self.codes, np.where(there, at // self.size, 0), 1), 0)
        return block.astype(np.int64), at % self.size // self.page, there

    @cached_property
    def _marks(self) -> tuple[np.ndarray, np.ndarray]:
        """(slots used, first column) of every page."""
        there = self._records[2]
        first = np.broadcast_to(np.arange(there.shape[1], dtype=np.int32) * self.page, there.shape)
        return np.where(there, self.page, 0).astype(np.uint8)[:, None], np.ascontiguousarray(first)

    def stored(self, pool: Pool, layer: Alike) -> PoolPages:
        """A layer's records."""
        block, inner, there = self._records
        strides = pool.stride(0), pool.stride(2)  # of one pool, the same for all layers
        if strides not in self._offsets:
            self._offsets[strides] = np.ascontiguousarray((block * strides[0] + inner * strides[1])[:, None])
        table = np.where(there[:, None], pool.data_ptr() + self._offsets[strides], 0)
        found = PoolPages(
            self.page, 1, table, *self._marks, layer.layout, pool=pool, block=block, inner=inner, size=layer.layout.size
        )
        vars(found).update(full=self._whole, even=self._whole)  # which each layer would work out again
        return found

    @cached_property
    def _whole(self) -> bool:
        """Whether all requests have as many pages."""
        return bool(self._records[2].all())

    @cached_property
    def _offsets(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    @cached_property
    def _positions(self) -> Int[Tensor, "b seen"]:
        own = np.maximum(-1, np.arange(self.seen) - self.shifts[:, None])
        return torch.from_numpy(own.astype(np.int32))

    @cached_property
    def _rows(self) -> tuple[Tensor | None, Tensor | None]:
        """(starts, shifts) as a snapshot has them."""
        starts = torch.from_numpy(self.starts) if self.starts.any() else None
        return starts, torch.from_numpy(self.shifts.astype(np.int32)) if self.shifts.any() else None

    @cached_property
    def short(self) -> Tensor | None:
        """Rows [b, 1] whose first tokens are in their windows still; None: none."""
        short = self.pages == 0
        return torch.from_numpy(short)[:, None] if short.any() else None

    @cached_property
    def _sink_columns(self) -> Int[Tensor, "b n"]:
        columns = torch.from_numpy(self.shifts.astype(np.int32))[:, None] + torch.arange(self.sinks, dtype=torch.int32)
        return columns if self.short is None else columns.masked_fill(self.short, -1)

    def _sinks(self, keys: Tensor, values: Tensor) -> ExactSinks:
        device, short = keys.device, self.short
        if short is not None:  # there may be anything in their places
            keys, values = (x.masked_fill(short.to(device)[..., None, None], 0.0) for x in (keys, values))
        simple = short is None and self._rows[1] is None
        return ExactSinks(keys, values, self._sink_columns.to(device), self.sinks, simple)

    @cached_property
    def _hidden(self) -> Hidden:
        """What the body does not show, since it is exact."""
        return Hidden(torch.full((self.rows,), self.sinks, dtype=torch.int32), self.sinks)

    def snapshot(
        self, pool: Pool, layer: Alike, sinks: tuple[Tensor, Tensor] | None, held: HeldRows | None = None
    ) -> Snapshot:
        """What a layer's attention reads beside the exact tokens. sinks: keys and values [b, h, n, d]; held: what has
        the exact tokens, and the sinks if there are any."""
        assert layer.codecs is not None
        device, (starts, shifts) = pool.device, self._rows
        hidden = self._hidden if self.sinks and (sinks is not None or held is not None) else None
        return Snapshot(
            shape=layer.shape,
            rope=layer.rope,
            tiers=(TierView(layer.codecs, self.stored(pool, layer)),) if self.pages.any() else (),
            sinks=None if sinks is None else self._sinks(*sinks),
            positions=self._positions.to(device),
            padded=False,
            first=self.seen - self.width,
            seen=self.seen,
            starts=None if starts is None else starts.to(device),
            shifts=None if shifts is None else shifts.to(device),
            hidden=None if hidden is None else hidden._replace(columns=hidden.columns.to(device)),
            held=held,
        )


class Places:
    """(block, slot) of a reading's exact tokens, for layers whose windows share a table [b, blocks]."""

    def __init__(self, reading: Reading, table: np.ndarray) -> None:
        self.reading, self.table = reading, table

    def rows(self, pool: Tensor, d: int) -> tuple[Float[Tensor, "b h w d"], Tensor]:
        """Exact keys and values, rows ending together: zeros where a row has none."""
        keys, values = rows_at(pool, self.exact, d)
        if not self.reading.starts.any():
            return keys, values
        before = self._before.to(pool.device)[:, None, :, None]  # there may be anything in a pool
        return keys.masked_fill(before, 0.0), values.masked_fill(before, 0.0)

    @cached_property
    def _before(self) -> Bool[Tensor, "b w"]:
        """Columns in front of a row's first exact token."""
        return torch.arange(self.reading.width) < torch.from_numpy(self.reading.starts)[:, None]

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Of each exact token, rows ending together: int64 [b, w]; any where a row has none."""
        own = self.reading
        return _of(self.table, np.maximum(0, own.length[:, None] - own.width + np.arange(own.width)), own.size)

    @cached_property
    def sinks(self) -> tuple[Tensor, Tensor]:
        own = self.reading
        return _of(self.table, np.broadcast_to(np.arange(own.sinks), (own.rows, own.sinks)), own.size)

    @cached_property
    def leaving(self) -> tuple[Tensor, Tensor]:
        """Of the tokens of pages that leave, [p, page]."""
        own, (row, number) = self.reading, self.reading.leaving
        return _of(self.table[row], number[:, None] * own.page + np.arange(own.page), own.size)

    def offsets(self, pool: Tensor) -> Int[Tensor, "b n"]:
        """Bytes from a pool's first token to each sink and exact token, the same for all pools of such strides; -1
        where a row has none."""
        key = pool.stride(0), pool.stride(2), pool.itemsize
        if key not in self._offsets:
            self._offsets[key] = self._offsets_of(*key)
        return self._offsets[key]

    @cached_property
    def _offsets(self) -> dict[tuple[int, int, int], Tensor]:
        return {}

    def _offsets_of(self, block_step: int, slot_step: int, size: int) -> Tensor:
        def bytes_to(places: tuple[Tensor, Tensor]) -> Tensor:
            return (places[0] * block_step + places[1] * slot_step) * size

        own = self.reading
        found = [bytes_to(self.exact).masked_fill(self._before, -1)]
        if own.sinks and own.pages.any():
            sinks = bytes_to(self.sinks)
            found.insert(0, sinks if own.short is None else sinks.masked_fill(own.short, -1))
        return torch.cat(found, 1)


@dataclass(frozen=True, eq=False)
class PoolRows(HeldRows):
    """Exact tokens, and sinks, where they are in a pool [blocks, h, size, keys and values of a token], d channels each:
    for one new token of each request."""

    pool: Tensor
    places: Places
    d: int

    def rows(self) -> tuple[Tensor, Tensor]:
        assert not self.places.reading.sinks, "rows of exact tokens have no sinks among them: attend reads both"
        return self.places.rows(self.pool, self.d)

    def attend(
        self, query: Float[Tensor, "b h x d"], snapshot: Snapshot, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        first, at = self.pool[0, :, 0], self.places.offsets(self.pool)
        keys, values = (Placed(part, at) for part in (first[:, : self.d], first[:, self.d :]))
        found = attend_held(query, keys, values, None, softcap, self.pool.dtype)
        return reference.attend(query, keys, values, None, softcap, self.pool.dtype) if found is None else found


def _of(table: np.ndarray, tokens: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    block = np.take_along_axis(table, tokens // size, 1)
    return torch.from_numpy(block.astype(np.int64)), torch.from_numpy(tokens % size)


def pages_of(tokens: np.ndarray, window: int, page: int) -> np.ndarray:
    """Whole pages that have left the window, of so many tokens: a function of the count alone."""
    return np.asarray(left(tokens, window, page) // page)


def rows_at(pool: Tensor, places: tuple[Tensor, Tensor], d: int) -> tuple[Float[Tensor, "b h t d"], Tensor]:
    """Keys and values at these (block, slot) [b, t] of a pool [blocks, h, size, keys and values of a token]."""
    block, slot = (x.to(pool.device) for x in places)
    both = pool[block, :, slot].transpose(1, 2)  # [b, h, t, 2 d]
    return both[..., :d], both[..., d:]
