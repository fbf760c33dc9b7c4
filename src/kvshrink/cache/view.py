"""What new tokens may see: the causal order or a mask, by column; pads, sinks and dead slots of the body's blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.cache.snapshot import Block, Snapshot
from kvshrink.shapes import Bool, Float


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


class Visibility:
    """What some of the new tokens, `count` from the `at`th on, may see of the columns, and what biases it."""

    def __init__(self, mask: Mask, s: int, at: int, count: int, members: int, snapshot: Snapshot) -> None:
        seen, device = snapshot.seen, snapshot.positions.device
        self.snapshot, self.members, self.count = snapshot, members, count
        # [b or 1, 1 or q, count, columns], None: everything is seen, nothing is added
        self.rows, self.biases = (None if x is None else x[:, :, at : at + count] for x in mask)
        if self.rows is None and s > 1:
            own = torch.arange(seen - s + at, seen - s + at + count, device=device)
            self.rows = (torch.arange(seen, device=device) <= own[:, None])[None, None]

    def columns(self, columns: slice | Tensor) -> Bool[Tensor, "#b #h #x t"] | None:
        """Visibility of these columns: a slice, or an index per row and lane [b, L, t]; -1 is taken as 0."""
        return None if self.rows is None else self._at(self.rows, columns)

    def bias(self, columns: slice | Tensor) -> Float[Tensor, "#b #h #x t"] | None:
        """What is added to the scores of these columns."""
        return None if self.biases is None else self._at(self.biases, columns)

    def _at(self, rows: Tensor, columns: slice | Tensor) -> Tensor:
        if isinstance(columns, slice):
            seen = rows[..., columns]
        else:
            b, lanes, _ = columns.shape
            heads = rows.shape[1] if rows.shape[1] > 1 else lanes
            index = columns.clamp_min(0).long().repeat_interleave(heads // lanes, 1)[:, :, None]
            seen = rows.expand(b, heads, -1, -1).gather(-1, index.expand(-1, -1, rows.shape[2], -1))
        b, heads, count, t = seen.shape
        if rows.shape[1] == 1:  # the same for all query heads of a lane
            return self.by_head(seen.repeat(1, 1, self.members, 1))
        return seen.reshape(b, heads // self.members, self.members * count, t)

    def by_head(self, lanes: Tensor) -> Tensor:
        """[b, L, ...] as [b, h, ...]; one lane is broadcast."""
        count = lanes.shape[1]
        return lanes if count == 1 else lanes.repeat_interleave(self.snapshot.shape.heads // count, 1)


class QueryChunk(NamedTuple):
    """Some of the new tokens: their scaled queries, all query heads of a KV head as rows, and what they may see."""

    query: Float[Tensor, "b h x d"]
    view: Visibility


def visible(block: Block, view: Visibility) -> Tensor | None:
    """Slots of a body block that are tokens (not pads, sinks or cut off) and that the mask shows."""
    return both(view.columns(view.snapshot.columns(block)), view.snapshot.shown(block), view)


def both(seen: Tensor | None, there: Tensor | None, view: Visibility) -> Tensor | None:
    """What the mask shows [#b, #h, #x, t] of the slots that are there [#b, #L, t]."""
    if there is None:
        return seen
    there = view.by_head(there[:, :, None])
    return there if seen is None else seen & there
