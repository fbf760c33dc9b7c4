"""Records in runs: memory that is taken once, written once, and shared by whoever names some of its records.

Growing takes another run and copies nothing. A fork of a cache names the same records; since a record is never written
again, neither has to copy it. A run is freed with the last one who holds it. What a holder names no more stays in a
run while others hold it too; else `trimmed` gives it back.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from kvshrink.kernels.records import Layout, Pieces
from kvshrink.shapes import UInt8


class Run:
    """Records taken at once. holders: who holds the run."""

    def __init__(self, data: UInt8[Tensor, "m size"]) -> None:
        self.data = data
        self.holders: WeakSet[Any] = WeakSet()

    @classmethod
    def take(cls, records: int, layout: Layout, device: torch.device) -> "Run":
        return cls(torch.empty(records, layout.size, dtype=torch.uint8, device=device))

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.data,)  # who holds it there, they say themselves

    @property
    def base(self) -> int:
        return self.data.data_ptr() or 1  # records without bytes have an address too

    @property
    def step(self) -> int:
        """From one record's address to the next one's."""
        return max(1, self.data.shape[1])

    def addresses(self) -> np.ndarray:
        return self.base + self.step * np.arange(len(self.data), dtype=np.int64)


def addressed(runs: Sequence[Run], run: np.ndarray, index: np.ndarray, there: np.ndarray) -> np.ndarray:
    """A table of addresses from which run, and which record of it, each entry is; 0 where there is none."""
    bases, steps = (np.array([getattr(r, name) for r in runs], np.int64) for name in ("base", "step"))
    return np.where(there, bases[run] + index * steps[run], 0)


class Places:
    """Which run, and which record of it, each address of a table is."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: run.base)
        self.bases = np.array([run.base for run in self.runs], dtype=np.int64)

    def of(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        run = np.searchsorted(self.bases, table, side="right") - 1
        steps = np.array([r.step for r in self.runs], dtype=np.int64)
        return run, (table - self.bases[run]) // steps[run]

    def gather(self, table: np.ndarray) -> UInt8[Tensor, "b L p size"]:
        """The records of a table [b, L, p] without zeros: a view where they lie evenly, else a copy."""
        found = self.find(table)
        return found.read(slice(None)) if isinstance(found, Pieces) else found

    def find(self, table: np.ndarray) -> UInt8[Tensor, "b L p size"] | Pieces:
        """The same, not copied before it is read."""
        found: Tensor
        run, index = self.of(table.ravel())
        if (run == run[0]).all():
            data = self.runs[run[0]].data
            if (steps := _even(index.reshape(table.shape))) is not None:
                size = data.shape[1]
                strides = (*(s * size for s in steps), 1)
                begin = data.storage_offset() + int(index[0]) * size
                found = data.as_strided((*table.shape, size), strides, begin)
                return found
            return Pieces([data], torch.from_numpy(index).to(data.device), table.shape)
        parts, at, total = [], np.zeros(len(self.runs), dtype=np.int64), 0
        met = np.sort(np.unique(run, return_index=True)[1])
        for n in run[met]:  # as they are met, so that pages that came one by one are in order once they are joined
            own = index[run == n]  # of each run no more than what lies between the first and the last that are wanted
            low, high = int(own.min()), int(own.max()) + 1
            parts.append(self.runs[n].data[low:high])
            at[n], total = total - low, total + high - low
        order = index + at[run]
        straight = np.array_equal(order, np.arange(total))
        return Pieces(parts, None if straight else torch.from_numpy(order).to(parts[0].device), table.shape)


def trimmed(table: np.ndarray, runs: Sequence[Run], holder: Any) -> tuple[np.ndarray, tuple[Run, ...]]:
    """The table and the runs that it needs, without records of the holder's own runs that it names no more."""
    live = np.unique(table[table > 0])
    found, table = [], table.copy()
    for run in runs:
        low, high = np.searchsorted(live, (run.base, run.base + run.step * len(run.data)))
        own = live[low:high]
        if not len(own):
            run.holders.discard(holder)
            continue
        alone = all(other is holder for other in run.holders)
        if len(own) < len(run.data) and alone:
            index = torch.from_numpy((own - run.base) // run.step).to(run.data.device)
            moved = Run(run.data[index])
            inside = (table >= run.base) & (table < run.base + run.step * len(run.data))
            table[inside] = moved.addresses()[np.searchsorted(own, table[inside])]
            moved.holders.add(holder)
            run = moved
        found.append(run)
    return table, tuple(found)


def _even(index: np.ndarray) -> tuple[int, int, int] | None:
    """Steps along each axis if records lie evenly in their run."""
    b, lanes, pages = index.shape
    first = int(index[0, 0, 0])
    steps = [
        int(index[1, 0, 0]) - first if b > 1 else 0,
        int(index[0, 1, 0]) - first if lanes > 1 else 0,
        int(index[0, 0, 1]) - first if pages > 1 else 0,
    ]
    grid = first + sum(
        step * np.arange(n).reshape([-1 if i == j else 1 for j in range(3)])
        for i, (step, n) in enumerate(zip(steps, index.shape, strict=True))
    )
    return (steps[0], steps[1], steps[2]) if min(steps) >= 0 and np.array_equal(grid, index) else None
