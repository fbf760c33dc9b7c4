"""What new tokens may see: the causal order or a mask, by column; pads, sinks and dead slots of the body's blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.cache.step import Handle
from kvshrink.shapes import Bool, Float
from kvshrink.store.pages import Block


class Mask(NamedTuple):
    """A mask as attention over stored tokens needs it, for all new tokens and columns; None: nothing of the kind."""

    seen: Bool[Tensor, "#b #q s c"] | None
    bias: Float[Tensor, "#b #q s c"] | None  # added to the scores, such as ALiBi's

    @classmethod
    def of(cls, mask: Tensor | None) -> "Mask":
        """From a bool mask or an additive one, whose lowest numbers hide and whose others, if not all 0, are a bias."""
        if mask is None or mask.dtype == torch.bool:
            return cls(mask, None)
        seen = mask > torch.finfo(mask.dtype).min / 2
        return cls(seen, mask.float().masked_fill(~seen, 0.0) if bool((seen & (mask != 0)).any()) else None)


class View:
    """What a slice of the new tokens, `count` from the `at`th on, may see of the columns, and what biases it."""

    def __init__(self, mask: Mask, s: int, at: int, count: int, members: int, handle: Handle) -> None:
        seen, device = handle.layer.seen, handle.layer.table.positions.device
        self.handle, self.members, self.count = handle, members, count
        # [b or 1, 1 or q, count, columns], None: everything is seen, nothing is added
        self.rows, self.biases = (None if x is None else x[:, :, at : at + count] for x in mask)
        if self.rows is None and s > 1:
            own = torch.arange(seen - s + at, seen - s + at + count, device=device)
            self.rows = (torch.arange(seen, device=device) <= own[:, None])[None, None]

    def columns(self, columns: slice | Tensor) -> Bool[Tensor, "#b #h #x t"] | None:
        """Visibility of these columns (a slice, or an index per slot [t] or per row [b, t]; -1 is taken as 0)."""
        return None if self.rows is None else self._at(self.rows, columns)

    def bias(self, columns: slice | Tensor) -> Float[Tensor, "#b #h #x t"] | None:
        """What is added to the scores of these columns."""
        return None if self.biases is None else self._at(self.biases, columns)

    def _at(self, rows: Tensor, columns: slice | Tensor) -> Tensor:
        if isinstance(columns, slice):
            seen = rows[..., columns]
        elif columns.dim() == 1:
            seen = rows[..., columns.clamp_min(0)]
        else:
            index = columns.clamp_min(0).long()[:, None, None]
            rows = rows.expand(columns.shape[0], -1, -1, -1)
            seen = rows.gather(-1, index.expand(-1, *rows.shape[1:3], -1))
        b, heads, count, t = seen.shape
        if heads == 1:
            return seen.repeat(1, 1, self.members, 1)
        return seen.reshape(b, heads // self.members, self.members * count, t)


class Slice(NamedTuple):
    """Some of the new tokens: their scaled queries, all query heads of a KV head as rows, and what they may see."""

    query: Float[Tensor, "b h x d"]
    view: View


def visible(block: Block, view: View) -> Tensor | None:
    """Slots of a body block that are tokens (not pads, sinks or cut off) and that the mask shows."""
    layer, columns = view.handle.layer, block.columns
    seen = view.columns(columns)
    there = None
    if layer.table.padded:
        positions = layer.table.positions
        index = (
            torch.arange(columns.start, columns.stop, device=positions.device)
            if isinstance(columns, slice)
            else columns
        )
        there = positions[:, index.clamp_min(0)] >= 0
        if layer.sinks.size and layer.sinks.columns is not None:
            there &= index > layer.sinks.last()
    if not isinstance(columns, slice):
        live = (columns >= 0)[None]
        there = live if there is None else there & live
    if there is None:
        return seen
    there = there[:, None, None]
    return there if seen is None else seen & there
