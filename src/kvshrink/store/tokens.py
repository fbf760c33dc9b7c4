"""Which token sits in which column of the sequence, once for all layers.

A column is a token's place in the batch's common timeline, as the attention mask sees it; its position is the number
RoPE turned it by. Left padding makes them differ per row, so positions are stored, never assumed: 4 bytes per token
for the whole model. A padded column has position -1.
"""

import torch
from torch import Tensor

from kvshrink.shapes import Bool, Int
from kvshrink.store.inference import outside_inference_mode

BYTES_PER_TOKEN = 4  # an int32 position
CHUNK = 256  # columns taken at a time; the table is small enough to be copied when it grows


class TokenTable:
    """Positions of every column seen, int32 [b, columns]."""

    def __init__(self) -> None:
        self.length = 0
        self.padded = False  # whether any row ever had a pad: pages may then hold pads and sinks as well
        self._positions: Tensor | None = None

    @property
    def positions(self) -> Int[Tensor, "b columns"]:
        assert self._positions is not None, "the table is empty"
        return self._positions[:, : self.length]

    @property
    def pads(self) -> Bool[Tensor, "b columns"] | None:
        """Which columns are pads; None if none is one now."""
        if not self.padded or not self.length:
            return None
        pads = self.positions < 0
        return pads if bool(pads.any()) else None

    @outside_inference_mode
    def append(self, positions: Int[Tensor, "b s"], real: Bool[Tensor, "b s"] | None) -> None:
        """Add s columns. `real` is False at pads; None means that no column is one."""
        if real is not None:
            positions = positions.masked_fill(~real, -1)
            self.padded = True
        b, s = positions.shape
        end = self.length + s
        if self._positions is None or end > self._positions.shape[1]:
            grown = torch.full((b, -(-end // CHUNK) * CHUNK), -1, dtype=torch.int32, device=positions.device)
            if self._positions is not None:
                grown[:, : self.length] = self.positions
            self._positions = grown
        self._positions[:, self.length : end] = positions
        self.length = end

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on. An empty table takes a batch of any size."""
        self.length = min(self.length, length)
        if self.length == 0:
            self.reset()

    @outside_inference_mode
    def map_rows(self, change) -> None:
        """Apply a batch operation such as index_select to the rows."""
        if self._positions is not None:
            self._positions = change(self._positions)

    def reset(self) -> None:
        self.length, self.padded, self._positions = 0, False, None

    def tensors(self) -> list[Tensor]:
        return [] if self._positions is None else [self._positions]

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` rebuilds the table."""
        tensors = {"positions": self.positions} if self.length else {}
        return {"length": self.length, "padded": self.padded}, tensors

    def restore(self, values: dict, tensors: dict[str, Tensor]) -> None:
        self.reset()
        if "positions" in tensors:
            self.append(tensors["positions"], None)
        self.padded = values["padded"]
