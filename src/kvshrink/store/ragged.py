"""Pages whose lanes hold different numbers of them, at rest: end to end, so that no lane pays for a longer one.

`Pages` has tables as wide as the longest lane, which is what a step reads and a change works on; heads that share a
budget may differ by five times. What is kept from step to step is this.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvshrink.shapes import Float, Int
from kvshrink.store.bytes import nbytes
from kvshrink.store.lanes import Pages
from kvshrink.store.pool import Run


@dataclass(frozen=True, eq=False)
class Ragged:
    """Pages of lanes that chose their tokens. counts: pages of each lane, int32 [b, L]; table, used [m]: those of all
    lanes, lane after lane, row after row; columns, importance: of their slots. frame: the records, and no page."""

    frame: Pages
    counts: np.ndarray
    table: np.ndarray
    used: np.ndarray
    columns: Int[Tensor, "m page"]
    importance: Float[Tensor, "m page"]

    @classmethod
    def of(cls, pages: Pages) -> "Ragged":
        assert pages.columns is not None
        assert pages.importance is not None
        none = Pages.none(pages.page, pages.lanes, len(pages.table))
        there = pages.table != 0
        at = torch.from_numpy(there).to(pages.columns.device)
        return cls(
            replace(none, layout=pages.layout, runs=pages.runs),
            there.sum(2, dtype=np.int32),
            pages.table[there],
            pages.used[there],
            pages.columns.unflatten(2, (-1, pages.page))[at],
            pages.importance.unflatten(2, (-1, pages.page))[at],
        )

    def __reduce__(self) -> tuple[Callable[[Pages], "Ragged"], tuple[Pages]]:
        return Ragged.of, (self.pages,)

    def __len__(self) -> int:
        """Pages of the longest lane."""
        return int(self.counts.max(initial=0))

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.frame.runs

    @cached_property
    def even(self) -> bool:
        """Whether all lanes have as many pages."""
        return bool((self.counts == len(self)).all())

    @property
    def pages(self) -> Pages:
        """With all that is known of tokens: the same memory where lanes are even, else made anew each time."""
        return self._in_place if self.even else self._spread()

    @cached_property
    def _in_place(self) -> Pages:
        shape = (*self.counts.shape, len(self))
        return replace(
            self.frame,
            table=self.table.reshape(shape),
            used=self.used.reshape(shape),
            first=np.broadcast_to(np.int32(0), (shape[0], shape[2])),  # of chosen tokens nothing follows from it
            columns=self.columns.view(*shape[:2], -1),
            importance=self.importance.view(*shape[:2], -1),
        )

    @cached_property
    def read(self) -> Pages:
        """Pages as steps read them until the next change: what says which tokens they are is made only if asked for,
        since among lanes of different lengths it is as large as if all were as long as the longest."""
        if self.even:
            return self._in_place
        there = self._there
        table, used = np.zeros(there.shape, np.int64), np.zeros(there.shape, np.uint8)
        table[there], used[there] = self.table, self.used
        first = np.broadcast_to(np.int32(0), (len(there), len(self)))
        return replace(self.frame, table=table, used=used, first=first, columns_of=self._columns)

    @property
    def _there(self) -> np.ndarray:
        return np.asarray(np.arange(len(self)) < self.counts[..., None])

    def _columns(self) -> Int[Tensor, "b L slots"]:
        found = self.columns.new_full((*self._there.shape, self.frame.page), -1)
        found[torch.from_numpy(self._there).to(found.device)] = self.columns
        return found.flatten(2)

    def _spread(self) -> Pages:
        columns = self._columns()
        importance = self.importance.new_full((*self._there.shape, self.frame.page), -torch.inf)
        importance[torch.from_numpy(self._there).to(importance.device)] = self.importance
        return replace(self.read, columns=columns, importance=importance.flatten(2), columns_of=None)

    def more_important(self, more: Float[Tensor, "b L slots"], fade: float = 1.0) -> "Ragged":
        """With more importance of each token, and what it had times `fade`."""
        page = self.frame.page
        own = self.importance  # what is infinite stays so: no token, or one that always stays
        old = own if fade == 1.0 else torch.where(own.isfinite(), own * fade, own)
        if self.even:
            return replace(self, importance=old + more.reshape(-1, page))
        there = np.arange(more.shape[2] // page) < self.counts[..., None]
        own = more.unflatten(2, (-1, page))[torch.from_numpy(there).to(more.device)]
        return replace(self, importance=old + own)

    @property
    def index_bytes(self) -> int:
        """Bytes of what says where and which tokens the records are."""
        arrays = self.counts.nbytes + self.table.nbytes + self.used.nbytes
        made: Pages | None = vars(self).get("_in_place")
        more = 0 if made is None else made.made_bytes
        if not self.even and (read := vars(self).get("read")) is not None:
            more += read.table.nbytes + read.used.nbytes + read.made_bytes
        return arrays + nbytes([self.columns, self.importance]) + more
