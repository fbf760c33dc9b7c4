"""Which token sits in which column of the batch, once for all layers.

A column is a token's place in the batch's common timeline, as the attention mask sees it; its position is the number
RoPE turned it by. Left padding makes them differ per row, so positions are stored, never assumed: 4 bytes per token
for the whole model. A padded column has position -1. Where a method asks which tokens came from images, that is a byte
per token more.

Rows of joined caches end together and begin where they are long enough to: row i's first token is in the batch's column
`shifts[i]`, and what stands before is a pad of which nothing is held. A layer counts a row's own columns from there on.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvshrink.shapes import Bool, Int
from kvshrink.store.growth import slots_for
from kvshrink.store.inference import outside_inference_mode

BYTES_PER_TOKEN = 4  # an int32 position
CHUNK = 256  # columns taken at a time, once there are as many; the table is small enough to be copied when it grows


class TokenTable:
    """Positions of every column seen, int32 [b, columns]."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.padded = False  # whether any row ever had a pad: pages may then hold pads
        self.shifts: np.ndarray | None = None  # int64 [b]; None: 0 for all
        self._positions: Tensor | None = None
        self._visual: Tensor | None = None  # as wide; None: no token came from an image
        self._elsewhere: dict[torch.device, Tensor] = {}

    @property
    def positions(self) -> Int[Tensor, "b columns"]:
        assert self._positions is not None, "the table is empty"
        return self._positions[:, : self.length]

    def positions_on(self, device: torch.device) -> Int[Tensor, "b columns"]:
        """The same on a device: layers of one model may be on several."""
        own = self.positions
        if own.device == device:
            return own
        found = self._elsewhere.get(device)
        if found is None or found.shape[1] < self.length:
            found = self._elsewhere[device] = own.to(device)
        return found[:, : self.length]

    @property
    def visual(self) -> Bool[Tensor, "b columns"] | None:
        """Which tokens came from images or videos; None: none did, or nobody asks."""
        return None if self._visual is None else self._visual[:, : self.length]

    @property
    def rows(self) -> int:
        return self.positions.shape[0] if self.length else 0

    @property
    def lengths(self) -> np.ndarray:
        """Columns of each row's own, int64 [b]."""
        every = np.full(self.rows, self.length, np.int64)
        return every if self.shifts is None else every - self.shifts

    @property
    def pads(self) -> Bool[Tensor, "b columns"] | None:
        """Which columns are pads, or before a row's beginning; None if none is."""
        if not (self.padded or self.shifts is not None) or not self.length:
            return None
        pads = self.positions < 0
        return pads if bool(pads.any()) else None

    @outside_inference_mode
    def append(
        self,
        positions: Int[Tensor, "b s"],
        real: Bool[Tensor, "b s"] | None,
        visual: Bool[Tensor, "b s"] | None = None,
    ) -> None:
        """Add s columns. `real` is False at pads; None means that no column is one. visual: tokens of images."""
        if real is not None:
            positions = positions.masked_fill(~real, -1)
            self.padded = True
        b, s = positions.shape
        end = self.length + s
        if self._positions is None or end > self._positions.shape[1]:
            grown = torch.full((b, slots_for(end, CHUNK)), -1, dtype=torch.int32, device=positions.device)
            if self._positions is not None:
                grown[:, : self.length] = self.positions
            self._positions = grown
        self._positions[:, self.length : end] = positions
        self._mark(visual, self.length, end)
        self.length = end
        self._elsewhere.clear()

    def _mark(self, visual: Bool[Tensor, "b s"] | None, start: int, end: int) -> None:
        """Enter which of the columns from start to end came from images."""
        assert self._positions is not None
        if self._visual is None and (visual is None or not bool(visual.any())):
            return
        if self._visual is None or self._visual.shape[1] < self._positions.shape[1]:
            grown = torch.zeros_like(self._positions, dtype=torch.bool)
            if self._visual is not None:
                grown[:, :start] = self._visual[:, :start]
            self._visual = grown
        self._visual[:, start:end] = False if visual is None else visual

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on. An empty table takes a batch of any size."""
        self.length = min(self.length, length)
        self._elsewhere.clear()
        if self.shifts is not None:
            self.shifts = np.minimum(self.shifts, self.length)
        if self.length == 0:
            self.reset()

    @outside_inference_mode
    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order; the same one may come more than once."""
        self._elsewhere.clear()
        if self._positions is not None:
            self._positions = self._positions[index.to(self._positions.device)]
        if self._visual is not None:
            self._visual = self._visual[index.to(self._visual.device)]
        if self.shifts is not None:
            shifts = self.shifts[index.cpu().numpy()]
            self.shifts = shifts if shifts.any() else None

    def __deepcopy__(self, memo: dict[Any, Any]) -> "TokenTable":
        other = memo[id(self)] = TokenTable()
        vars(other).update(vars(self))
        other._positions, other._elsewhere = None if self._positions is None else self._positions.clone(), {}
        other._visual = None if self._visual is None else self._visual.clone()
        return other

    def row(self, number: int) -> "TokenTable":
        """The table of one row alone, in its own columns."""
        other, start = TokenTable(), 0 if self.shifts is None else int(self.shifts[number])
        visual = None if self.visual is None else self.visual[number : number + 1, start:]
        other.append(self.positions[number : number + 1, start:], None, visual)
        other.padded = bool((other.positions < 0).any())
        return other

    @classmethod
    def joined(cls, tables: list["TokenTable"]) -> "TokenTable":
        """The rows of all, ending together."""
        other, most = cls(), max(t.length for t in tables)
        parts = [torch.nn.functional.pad(t.positions, (most - t.length, 0), value=-1) for t in tables]
        marks = [t.visual if t.visual is not None else torch.zeros_like(t.positions, dtype=torch.bool) for t in tables]
        visual = torch.cat([torch.nn.functional.pad(m, (most - m.shape[1], 0)) for m in marks])
        other.append(torch.cat(parts), None, visual)
        other.padded = any(t.padded for t in tables)
        lengths = np.concatenate([t.lengths for t in tables])
        other.shifts = most - lengths if (lengths < most).any() else None
        return other

    def tensors(self) -> list[Tensor]:
        return [t for t in (self._positions, self._visual, *self._elsewhere.values()) if t is not None]

    def state(self) -> tuple[dict[Any, Any], dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` rebuilds the table."""
        tensors = {"positions": self.positions} if self.length else {}
        shifts = None if self.shifts is None else self.shifts.tolist()
        if visual := self.visual is not None and bool(self.visual.any()):
            tensors["visual"] = self.visual
        return {"length": self.length, "padded": self.padded, "shifts": shifts, "visual": visual}, tensors

    def restore(self, values: dict[Any, Any], tensors: dict[str, Tensor]) -> None:
        self.reset()
        if "positions" in tensors:
            self.append(tensors["positions"], None, tensors.get("visual"))
        self.padded = values["padded"]
        self.shifts = None if values["shifts"] is None else np.array(values["shifts"], np.int64)
