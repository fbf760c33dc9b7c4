"""The first tokens of each row of a layer, exact, in the model's own dtype."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.snapshot import Hidden
from kvshrink.shapes import Bool, Int


class Sinks:
    """The first `size` real tokens of each row, kept when they leave the window. Rows differ if they are padded.

    Its tensors are never changed in place: a step that reads them, or a fork, has them as they were.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.full = size == 0
        self.hidden: Hidden | None = None  # everything up to a row's last sink is a pad or a sink
        self.simple = False  # whether they are the first columns in every row
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.columns: Tensor | None = None  # int32 [b, size], a row's own columns; -1 where there is none yet

    def wanted(self, real: Bool[Tensor, "b c"], first: int) -> Bool[Tensor, "b m"]:
        """Which of the columns from `first` on are sinks, given which of all columns are real tokens."""
        order = real.cumsum(1)  # 1 for a row's first real token
        return (real & (order <= self.size))[:, first:]

    def capture(self, keys: Tensor, values: Tensor, columns: Int[Tensor, "b m"], wanted: Bool[Tensor, "b m"]) -> None:
        """Take the wanted tokens of keys and values [b, h, m, d], which have these columns."""
        row, at = wanted.nonzero(as_tuple=True)
        if not len(row):
            return
        if self.keys is None or self.values is None or self.columns is None:
            b, h, _, d = keys.shape
            self.keys, self.values = (
                keys.new_zeros(b, h, self.size, d),
                values.new_zeros(b, h, self.size, values.shape[3]),
            )
            self.columns = torch.full((b, self.size), -1, dtype=torch.int32, device=keys.device)
        # a row's next free slot, counted on from the sinks that it has
        slot = ((self.columns >= 0).sum(1, keepdim=True) + wanted.cumsum(1) - 1)[row, at]
        self.keys, self.values, self.columns = self.keys.clone(), self.values.clone(), self.columns.clone()
        self.keys[row, :, slot] = keys[row, :, at]
        self.values[row, :, slot] = values[row, :, at]
        self.columns[row, slot] = columns[row, at].int()
        self._settle()

    def others(
        self, valid: Bool[Tensor, "m t"] | None, columns: Int[Tensor, "m t"], rows: np.ndarray | None
    ) -> Bool[Tensor, "m t"] | None:
        """Of tokens at these columns of some rows (None: all), those that are no pads, and no sinks."""
        if self.hidden is None or int(columns.min()) >= self.hidden.most:
            return valid
        last = self.hidden.columns if rows is None else self.hidden.columns[torch.from_numpy(rows).to(columns.device)]
        own = columns >= last[:, None]
        return own if valid is None else valid & own

    def _settle(self) -> None:
        """What follows from the columns, worked out once for all steps until they change."""
        assert self.columns is not None
        if not bool((self.columns >= 0).any()):  # of these rows no token has left, or a crop took them back
            vars(self).update(vars(Sinks(self.size)))
            return
        hidden = self.columns.amax(1) + 1
        self.full = bool((self.columns >= 0).all())
        self.hidden = Hidden(hidden, int(hidden.max()))
        first = torch.arange(self.size, device=self.columns.device)
        self.simple = bool((self.columns == first).all())

    def crop(self, lengths: Int[Tensor, " b"]) -> None:
        """Forget the columns from each row's length on."""
        if self.columns is not None:
            lengths = lengths.to(self.columns.device)
            self.columns = self.columns.masked_fill(self.columns >= lengths[:, None], -1)
            self._settle()

    def select(self, index: Int[Tensor, " n"]) -> None:
        if self.keys is not None and self.values is not None and self.columns is not None:
            index = index.to(self.keys.device)
            self.keys, self.values, self.columns = self.keys[index], self.values[index], self.columns[index]
            self._settle()

    @classmethod
    def joined(cls, parts: Sequence["Sinks"], rows: Sequence[int]) -> "Sinks":
        """The rows of all, one below the other; rows: how many each has."""
        other = cls(parts[0].size)
        some = next((p for p in parts if p.keys is not None), None)
        if some is None or some.keys is None or some.values is None or some.columns is None:
            return other
        like = (some.keys, some.values, some.columns)
        found = []
        for part, b in zip(parts, rows, strict=True):
            own = part.tensors().values()
            empty = (t.new_full((b, *t.shape[1:]), 0 if t.dtype.is_floating_point else -1) for t in like)
            found.append(tuple(own or empty))
        other.restore(dict(zip(("keys", "values", "columns"), map(torch.cat, zip(*found, strict=True)), strict=True)))
        return other

    def fork(self) -> "Sinks":
        other = Sinks(self.size)
        vars(other).update(vars(self))
        return other

    def to(self, device: torch.device | str) -> None:
        if self.keys is not None and self.values is not None and self.columns is not None:
            self.keys, self.values, self.columns = (
                t.to(device, non_blocking=True) for t in (self.keys, self.values, self.columns)
            )
            self._settle()

    def tensors(self) -> dict[str, Tensor]:
        if self.keys is None or self.values is None or self.columns is None:
            return {}
        return {"keys": self.keys, "values": self.values, "columns": self.columns}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """From what `tensors` gave."""
        self.keys, self.values, self.columns = tensors["keys"], tensors["values"], tensors["columns"]
        self._settle()
