"""What attention reads of a layer in one step: a value that stays as it is while the step adds tokens.

It knows no layer, so that attention can be tested, and a batch be put together, without one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.rope import Rope
from kvshrink.kernels.decode import Choice, Live, fused
from kvshrink.kernels.held import attend as attend_held
from kvshrink.kernels.latents import Packed
from kvshrink.methods._roles import Codec, Stored
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._window import WindowForm
from kvshrink.shapes import Bool, Float, Int, UInt8
from kvshrink.store.lanes import Pages, Span


@dataclass(frozen=True, eq=False)
class Block:
    """Some consecutive pages of all lanes. base: pages of the same tokens in the layer that this one follows. shown: as
    a TierView's."""

    pages: Pages
    start: int
    stop: int
    base: Pages | None = None
    shown: Bool[Tensor, "b L t"] | None = None

    def part(self, prefix: str) -> Stored:
        """Tensors of the keys, "k.", or of the values, "v."; those of the other layer beside them, as "base.*"."""
        records = self.pages.records(self.start, self.stop).under(prefix)
        if self.base is None:
            return records
        beside = self.base.records(self.start, self.stop).under(prefix)
        return {**records, **{f"base.{k}": beside[k] for k in beside}}

    @property
    def tokens(self) -> int:
        """Slots of a lane, dead ones included."""
        return (self.stop - self.start) * self.pages.page

    @property
    def span(self) -> Span | None:
        """The columns, if they are the same in all lanes and without a gap."""
        whole = self.pages.span
        return whole and Span(*(whole.start + at * self.pages.page for at in (self.start, self.stop)))

    def slots(self, device: torch.device) -> Int[Tensor, "b L t"]:
        """A row's own column of each slot, -1 if it holds no token."""
        page = self.pages.page
        return self.pages.slots[:, :, self.start * page : self.stop * page].to(device)


def kernel_of(codecs: tuple[Codec, Codec], packed: tuple[Packed | None, Packed | None], device: torch.device) -> Choice:
    """The fused kernel that reads these codecs' pages, or why there is none."""
    if codecs[0].site == "k_pre" and codecs[0].expansion is None:
        return Choice(None, "keys before RoPE that no basis rebuilds")
    return fused(device, *packed)


@dataclass(frozen=True, eq=False)
class TierView:
    """Pages of one age as a step reads them.

    base: pages of the same tokens in the layer that this one follows; their tensors are beside its own in a block.
    shown: slots that are read here, by lane, where another tier is read for the others; None: all.
    """

    codecs: tuple[Codec, Codec]
    pages: Pages
    base: Pages | None = None
    shown: Bool[Tensor, "b L t"] | None = None

    def block(self, start: int, stop: int) -> Block:
        page = self.pages.page
        shown = None if self.shown is None else self.shown[:, :, start * page : stop * page]
        return Block(self.pages, start, stop, self.base, shown)

    def blocks(self, tokens: int) -> Iterator[Block]:
        return (self.block(*part) for part in self.pages.blocks(tokens))

    def stored(self, block: Block) -> tuple[Stored, Stored]:
        """What the key codec and the value codec read of a block."""
        keys = block.part("k.")
        return keys, keys if self.codecs[1].joint else block.part("v.")

    @cached_property
    def packed(self) -> tuple[Packed | None, Packed | None]:
        """All pages as fused kernels read them."""
        if self.base is not None:
            return None, None
        keys, values = self.stored(self.block(0, len(self.pages)))
        return self.codecs[0].packed(keys), self.codecs[1].packed(values)

    @cached_property
    def kernel(self) -> Choice:
        """The fused kernel for these pages, or why there is none."""
        if self.base is not None:
            return Choice(None, "stored as what it adds to another layer")
        return kernel_of(self.codecs, self.packed, self.pages.device)

    @cached_property
    def counts(self) -> UInt8[Tensor, "b L p"] | None:
        """Slots filled of each page; None: all of all."""
        pages = self.pages
        return None if pages.full and pages.even else torch.from_numpy(pages.used).to(pages.device)

    @cached_property
    def plain(self) -> bool:
        """Whether a row's slots are its columns from the first page's on, so that leading ones can be counted off."""
        pages = self.pages
        right = pages.first[:, :1] + pages.page * np.arange(len(pages))
        return bool(((pages.first == right) | (pages.table[:, 0] == 0)).all())

    def skips(self, hidden: "Hidden") -> Int[Tensor, " b"] | None:
        """Leading slots of each row that are not read."""
        begin = self.pages.first[:, 0]
        columns: list[int] = begin.tolist()  # of a few rows, which numpy's own loops take longer for
        if not any(columns):
            return hidden.columns
        if min(columns) >= hidden.most:
            return None
        return (hidden.columns - torch.from_numpy(begin).to(hidden.columns.device)).clamp_min(0)


class Hidden(NamedTuple):
    """Leading columns of each row that its body does not show, since each is a pad or a sink. most: of any row."""

    columns: Int[Tensor, " b"]
    most: int


class ExactSinks(NamedTuple):
    """First tokens of each row, in columns of the batch; -1 where there is none."""

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n e"]
    columns: Int[Tensor, "b n"]
    size: int
    simple: bool  # whether they are the first columns in every row


class HeldRows(ABC):
    """The exact tokens where something else than the returned tensor holds them."""

    @abstractmethod
    def rows(self) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w e"]]:
        """Keys and values of them."""

    @abstractmethod
    def attend(
        self, query: Float[Tensor, "b h x d"], snapshot: "Snapshot", softcap: float | None
    ) -> tuple[Tensor, Tensor] | None:
        """(output, log-sum-exp) of attention to all of them and to the snapshot's sinks; None where it takes rows."""


@dataclass(frozen=True, eq=False)
class WindowRows(HeldRows):
    """As their window holds them: `form` gives keys and values [b, h, w, d] of them."""

    keys: Tensor
    values: Tensor
    form: WindowForm

    def rows(self) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w e"]]:
        return self.form.rows(self.keys), self.form.rows(self.values)

    def attend(
        self, query: Float[Tensor, "b h x d"], snapshot: "Snapshot", softcap: float | None
    ) -> tuple[Tensor, Tensor] | None:
        sinks = snapshot.sinks
        if snapshot.starts is not None or (sinks is not None and not sinks.simple):
            return None
        first = None if sinks is None else (sinks.keys, sinks.values)
        return attend_held(query, self.keys, self.values, first, softcap, snapshot.shape.dtype)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Rides on the key tensor that `update` returns: what attention must read besides that tensor.

    first:  column of the first exact token; seen: columns in all.
    starts: of rows that differ, the first slot of the exact tokens that is a row's own; None: 0.
    shifts: of joined rows, the column of each one's first token, [b]; None: 0.
    hidden: leading columns of each row that its body does not show; None: none.
    held:   the exact tokens as they are held; at 8 bits the returned tensor is the new ones alone. None: it has all.
    """

    shape: LayerShape
    rope: Rope | None
    tiers: tuple[TierView, ...]  # of the body before this step, the oldest first
    sinks: ExactSinks | None
    positions: Int[Tensor, "b seen"]
    padded: bool
    first: int
    seen: int
    starts: Int[Tensor, " b"] | None = None
    shifts: Int[Tensor, " b"] | None = None
    hidden: Hidden | None = None
    held: HeldRows | None = None

    @property
    def pages(self) -> int:
        return sum(len(tier.pages) for tier in self.tiers)

    @property
    def held_tokens(self) -> int:
        """Slots of sinks and of the body, of the longest lane."""
        return (0 if self.sinks is None else self.sinks.size) + self.pages * self.page

    @property
    def page(self) -> int:
        return self.tiers[0].pages.page if self.tiers else 1

    def columns(self, block: Block) -> slice | Int[Tensor, "b L t"]:
        """Columns of a block's slots: a slice where all lanes have the same, else -1 for a slot without a token."""
        span = block.span
        if span is not None and self.shifts is None:
            return slice(*span)
        own = block.slots(self.positions.device)
        return own if self.shifts is None else torch.where(own < 0, own, own + self.shifts[:, None, None])

    def positions_of(self, columns: slice | Int[Tensor, "b L t"]) -> Int[Tensor, "b t"]:
        """Positions of columns that all lanes of a row have in common."""
        if isinstance(columns, slice):
            return self.positions[:, columns]
        return self.positions.gather(1, columns[:, 0].clamp_min(0).long())

    def turned(self, keys: Float[Tensor, "b h t d"], columns: slice | Int[Tensor, "b L t"]) -> Float[Tensor, "b h t d"]:
        """Keys before RoPE as attention uses them, where these columns are."""
        if self.rope is None:
            return keys
        if isinstance(columns, slice) or columns.shape[1] == 1:
            return self.rope.apply(keys, self.positions_of(columns))
        lanes = columns.shape[1]  # whose tokens are not the same
        own = self.positions[:, None].expand(-1, lanes, -1).gather(2, columns.clamp_min(0).long())
        by_lane = self.rope.apply(keys.unflatten(1, (lanes, -1)).flatten(0, 1), own.flatten(0, 1))
        found: Tensor = by_lane.unflatten(0, (-1, lanes)).flatten(1, 2)
        return found

    def live(self, tier: TierView) -> tuple[Live, Bool[Tensor, "#b #L t"] | None]:
        """Which slots of a tier are read: as kernels count them off, and by slot where they cannot."""
        if tier.pages.chosen:  # chosen tokens, no pad or sink among them
            return Live(tier.counts), None
        if self.padded or tier.shown is not None or (self.hidden is not None and not tier.plain):
            return Live(tier.counts), self.shown(tier.block(0, len(tier.pages)))
        return Live(tier.counts, None if self.hidden is None else tier.skips(self.hidden)), None

    def shown(self, block: Block) -> Bool[Tensor, "#b #L t"] | None:
        """Slots of a block that are tokens, and no pads or sinks; None: all."""
        columns, span = self.columns(block), block.span
        parts = [] if isinstance(columns, slice) else [columns >= 0]
        parts += [] if block.shown is None else [block.shown]
        if self.padded:
            parts.append(self._real(columns))
        if self.hidden is not None and (span is None or span.start < self.hidden.most):
            device = self.positions.device
            own = block.slots(device) if span is None else torch.arange(*span, device=device)
            parts.append(own >= self.hidden.columns[:, None, None])
        return reduce(torch.logical_and, parts) if parts else None

    def _real(self, columns: slice | Int[Tensor, "b L t"]) -> Bool[Tensor, "#b #L t"]:
        """Which columns are no pads."""
        if isinstance(columns, slice):
            return (self.positions[:, columns] >= 0)[:, None]
        index = columns.clamp_min(0).long().flatten(1)
        return self.positions.gather(1, index).view(columns.shape) >= 0
