"""How the recent tokens are held: in the model's own dtype, or at 8 bits with a scale per token and KV head.

At short contexts an exact window is much of what a small cache holds: 64 tokens are half of a sixteenth of 2,048. Eight
bits halve it, and cost less than what the bytes give back elsewhere (docs/accuracy.md).
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.kernels.held import SCALE, rounded, unrounded
from kvshrink.methods._stats import LayerShape
from kvshrink.shapes import Float


@final
@dataclass(frozen=True)
class WindowForm:
    """Rows of a layer as its window stores them, and back. bits: 8, or None for the rows as they are."""

    bits: int | None
    shape: LayerShape

    def stored(self, rows: Float[Tensor, "b h w d"]) -> Tensor:
        """Rows as they are held: themselves, or bytes [b, h, w, d + 2], codes and the scale behind them."""
        if self.bits is None:
            return rows
        return rounded(rows)

    def rows(self, stored: Tensor) -> Float[Tensor, "b h w d"]:
        """Rows of the model's dtype from what `stored` gave; zeros from bytes of zero."""
        if self.bits is None:
            return stored
        return unrounded(stored, self.shape.dtype)

    @property
    def kinds(self) -> tuple[tuple[torch.dtype, int], tuple[torch.dtype, int]]:
        """(dtype, numbers) of a stored key, and of a stored value."""
        widths = self.shape.head_dim, self.shape.value_dim
        dtype, more = (self.shape.dtype, 0) if self.bits is None else (torch.uint8, SCALE.itemsize)
        return (dtype, widths[0] + more), (dtype, widths[1] + more)

    @property
    def token_bytes(self) -> int:
        """Of a token's key and value, all heads."""
        return sum(self.shape.heads * numbers * dtype.itemsize for dtype, numbers in self.kinds)
