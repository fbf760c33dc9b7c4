"""One step's move from a layer's window to its sinks and body: what leaves is encoded, or chosen from, and kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.attend import stored_keys
from kvshrink.cache.body import Body
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.encode import encode
from kvshrink.cache.leaving import Leaving, Paged, by_kind, cut, kinds, leavings, left, paged, picked, quiet, spread
from kvshrink.cache.rope import as_stored
from kvshrink.cache.scoring import ProbeQueries, received
from kvshrink.cache.sinks import Sinks
from kvshrink.cache.snapshot import Snapshot
from kvshrink.cache.window import Window
from kvshrink.errors import SettingError
from kvshrink.methods._abilities import MovesSlots, find
from kvshrink.methods._roles import Codec, Method, Stored
from kvshrink.shapes import Bool, Float, Int
from kvshrink.store.choosing import kept, most_important, slots_of
from kvshrink.store.lanes import Pages
from kvshrink.store.names import under
from kvshrink.store.rows import joined
from kvshrink.store.tokens import TokenTable

ENCODE_TOKENS = 2048  # encoded at a time in a prefill, so that float32 copies stay small


@dataclass(frozen=True)
class Leave:
    """What a layer's tokens leave into, and how. base: pages of the layer that this one is stored as a delta to."""

    method: Method
    codecs: tuple[Codec, Codec] | None
    visual: tuple[Codec, Codec] | None  # of pages of images; None: as all others
    table: TokenTable
    window: Window
    sinks: Sinks
    body: Body
    watch: DriftWatch | None
    base: Pages | None
    before: Snapshot  # of the layer as the step reads it

    @property
    def first(self) -> int:
        """The batch's column of slot 0 of the exact tokens."""
        return self.before.first

    def rank(self, probe: ProbeQueries | None, keys: Tensor, new: int) -> Float[Tensor, "b h t"] | None:
        """Importance of the exact tokens, where something asks for it; a running scorer's goes on from step to step."""
        scorer, before = self.method.scorer, self.before
        if scorer is None or probe is None:
            return None
        blocks = partial(stored_keys, before) if scorer.everything else tuple
        got, stored = received(probe, keys, before.positions[:, before.first :] >= 0, new, blocks)
        ranked = scorer.importance(got)
        if scorer.running:
            ranked = self.window.add_scores(ranked)
            if stored is not None and before.tiers:
                self.body.add_importance(stored[..., 0 if before.sinks is None else before.sinks.size :])
        return ranked

    def run(self, keys: Tensor, values: Tensor, ranked: Float[Tensor, "b h t"] | None) -> None:
        """Move what leaves of these exact tokens to sinks and body; the window keeps the rest."""
        window, page, slots = self.method.window, self.method.page, keys.shape[2]
        starts, seen = self.window.starts, self.first + slots
        if starts is None and self.table.shifts is None and quiet(self.first, seen, window, page):
            return
        lengths = self.table.lengths
        exact = np.minimum(lengths, slots - (0 if starts is None else starts))
        positions = self.before.positions[:, self.first :]
        for leaving in leavings(lengths, exact, slots, window, page):
            self._capture(leaving, keys, values)
            if self.codecs is not None:
                self._store(leaving, keys, values, positions, ranked)
        stay = np.minimum(exact, lengths - left(lengths, window, page))
        if slots <= self.window.capacity and (stay == exact).all():
            return
        gone = slots - int(stay.max())
        starts = slots - stay
        self.window.starts = starts if (starts != gone).any() else None
        self.window.keep(keys, values, gone)

    def _capture(self, leaving: Leaving, keys: Tensor, values: Tensor) -> None:
        """Keep those of the leaving tokens that are sinks."""
        if self.sinks.full:
            return
        seen, device = self.first + keys.shape[2], keys.device
        wanted = self.sinks.wanted(self.table.positions_on(device)[:, :seen] >= 0, self.first).clone()
        slot = torch.arange(keys.shape[2], device=device)
        wanted &= (slot >= leaving.start) & (slot < leaving.stop)
        if leaving.rows is not None:
            others = np.setdiff1d(np.arange(len(keys)), leaving.rows)
            wanted[torch.from_numpy(others).to(device)] = False
        columns = self._columns(slot, len(keys))
        part = slice(0, leaving.stop)
        self.sinks.capture(keys[:, :, part], values[:, :, part], columns[:, part], wanted[:, part])

    def _store(
        self,
        leaving: Leaving,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        importance: Float[Tensor, "b h t"] | None,
    ) -> None:
        """Encode what leaves, some pages at a time, into the body."""
        page = self.method.page
        if importance is None and self.method.token_budget is not None:  # no queries are known: all alike
            importance = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        whole = paged(leaving, keys, values, positions, self.table.padded, page, self.body.lanes)
        own = None if importance is None else spread(leaving.of(importance), leaving, page)
        columns = spread(leaving.of(positions, 1), leaving, page)
        if self.method.token_budget is not None:
            stored = [self._encode(*part, leaving.rows) for part in self._parts(whole, columns, own)]
            if stored:
                joint = {k: torch.cat([s[k] for s in stored], 1) for k in stored[0]}
                self._choose(leaving, whole, joint, own, len(keys))
        elif self.visual is None or self.table.visual is None:
            self._append(whole, columns, own, leaving.rows, len(keys))
        else:
            self._append_by_kind(leaving, whole, columns, own, len(keys))

    def _append(
        self,
        whole: Paged,
        positions: Tensor,
        importance: Tensor | None,
        rows: np.ndarray | None,
        batch: int,
        visual: bool = False,
    ) -> None:
        """Encode pages of some rows (None: all), some at a time, into the body."""
        parts = list(self._parts(whole, positions, importance))
        if parts:
            skip = whole.first.shape[1] - sum(p.first.shape[1] for p, _, _ in parts)
            encoded = (self._encode(*part, rows, visual) for part in parts)
            self.body.append(encoded, whole.first[:, skip:], whole.used[:, :, skip:], rows, batch, visual)

    def _append_by_kind(
        self, leaving: Leaving, whole: Paged, positions: Tensor, importance: Tensor | None, batch: int
    ) -> None:
        """The same, pages of images by themselves."""
        page, every = self.method.page, np.arange(len(whole.first)) if leaving.rows is None else leaving.rows
        marks = self._of_images(self._own_columns(whole), every)
        for visual, rows, pages in by_kind(kinds(whole, marks, page)):
            keys, values = (picked(x, rows, pages, page, 2) for x in (whole.keys, whole.values))
            valid = None if whole.valid is None else picked(whole.valid, rows, pages, page, 1)
            of_pages = np.ix_(rows, pages)
            part = Paged(keys, values, valid, whole.first[of_pages], whole.used.swapaxes(1, 2)[of_pages].swapaxes(1, 2))
            own = None if importance is None else picked(importance, rows, pages, page, importance.dim() - 1)
            at = picked(positions, rows, pages, page, 1)
            chosen = None if len(rows) == batch and leaving.rows is None else every[rows]
            self._append(part, at, own, chosen, batch, visual)

    def _of_images(self, columns: Int[Tensor, "b t"], rows: np.ndarray) -> Bool[Tensor, "b t"]:
        """Which of these rows' own columns are tokens of images."""
        visual = self.table.visual
        assert visual is not None
        shifts = np.zeros(len(rows), np.int64) if self.table.shifts is None else self.table.shifts[rows]
        own = columns.to(visual.device).long()
        at = own + torch.from_numpy(shifts[:, None]).to(visual.device)
        found = visual[torch.from_numpy(rows).to(visual.device)].gather(1, at.clamp(0, visual.shape[1] - 1))
        return (found & (own >= 0)).to(columns.device)

    def _parts(
        self, whole: Paged, positions: Int[Tensor, "b t"], importance: Tensor | None
    ) -> Iterator[tuple[Paged, Tensor, Tensor | None]]:
        """Some pages at a time, with positions and importance of their tokens; not what would be dropped at once."""
        page, pages = self.method.page, whole.first.shape[1]
        skip = 0 if (room := self.body.room) is None else max(0, pages - room)
        step = max(1, ENCODE_TOKENS // page)
        for at in range(skip, pages, step):
            stop = min(at + step, pages)
            slots = slice(at * page, stop * page)
            own = None if importance is None else importance[..., slots]
            yield cut(whole, at, stop, page), positions[:, slots], own

    def _encode(
        self, part: Paged, positions: Tensor, importance: Tensor | None, rows: np.ndarray | None, visual: bool = False
    ) -> dict[str, Tensor]:
        codecs = self.visual if visual else self.codecs
        assert codecs is not None
        keys = as_stored(codecs[0], part.keys, positions, self.before.rope)
        stored = encode(codecs, keys, part.values, part.valid, importance, self._base_of(part))
        if self.watch is not None and not visual:
            self.watch.add(keys, part.values, self.sinks.others(part.valid, self._own_columns(part), rows))
        return stored

    def _base_of(self, part: Paged) -> Callable[[str], Stored] | None:
        """The pages of the same tokens in the layer that this one is a delta to, by "k." and "v."."""
        if self.base is None:
            return None
        start = int(np.nonzero(self.base.first[0] == part.first[0, 0])[0][-1])
        return partial(under, dict(self.base.records(start, start + part.first.shape[1])))

    def _choose(self, leaving: Leaving, whole: Paged, stored: Stored, importance: Tensor | None, batch: int) -> None:
        """Keep the most important of what these rows hold and of what leaves now."""
        page = self.method.page
        assert importance is not None
        pages = self.body.youngest.for_rows(batch)
        old = pages if leaving.rows is None else pages.selected(leaving.rows)
        columns = self._own_columns(whole).int()
        shown = self._shown(whole, columns, leaving.rows)
        lanes = (len(columns), self.body.lanes, columns.shape[1])
        fresh = importance.unflatten(1, (self.body.lanes, -1)).mean(2).masked_fill(~shown[:, None], -torch.inf)
        columns = columns[:, None].expand(lanes)
        if len(old) and old.columns is not None and old.importance is not None:
            before = old.records()
            stored = {k: torch.cat([before[k], t], 1) for k, t in stored.items()}
            fresh = torch.cat([old.importance.masked_fill(old.columns < 0, -torch.inf), fresh], 2)
            columns = torch.cat([old.columns, columns], 2)
        rows = np.arange(batch) if leaving.rows is None else leaving.rows
        chosen = kept(old, stored, columns, fresh, slots_of(self._staying(fresh, columns, rows), page), self._move)
        self.body.hold(self.body.ages[0], chosen if leaving.rows is None else _placed(pages, chosen, leaving.rows))

    def _staying(
        self, importance: Float[Tensor, "b L t"], columns: Int[Tensor, "b L t"], rows: np.ndarray
    ) -> Bool[Tensor, "b L t"]:
        """Which candidates of these rows stay, those of images under a budget of their own where there is one."""
        budget, other, page = self.method.token_budget, self.method.visual_budget, self.method.page
        assert budget is not None
        gone = left(self.table.lengths[rows], self.method.window, page)
        if other is None or self.table.visual is None:
            return most_important(importance, budget.counts(importance, torch.from_numpy(gone // page), page))
        marks = self._of_images(columns.flatten(1), rows).view(columns.shape)
        every = torch.arange(int(gone.max()), device=columns.device)
        inside = every < torch.from_numpy(gone).to(every.device)[:, None]
        images = (self._of_images(every.expand(len(rows), -1), rows) & inside).sum(1).cpu() // page
        found = torch.zeros_like(marks)
        for part, of, pages in ((budget, ~marks, torch.from_numpy(gone // page) - images), (other, marks, images)):
            candidates = importance.masked_fill(~of, -torch.inf)
            found |= most_important(candidates, part.counts(candidates, pages, page))
        return found

    def _move(self, stored: Stored, index: Int[Tensor, "b L k"]) -> Stored:
        found: dict[str, Tensor] = {}
        for prefix, codec in zip(("k.", "v."), self.codecs or (), strict=True):
            able = find(codec, MovesSlots)  # type: ignore[type-abstract]  # mypy takes no abstract class as a value
            if able is None:
                name = type(self.method).__name__
                raise SettingError(
                    f"{name} drops stored tokens, which this codec's pages cannot. Use scales per token."
                )
            moved = able.moved(under(stored, prefix), index)
            found |= {f"{prefix}{k}": t for k, t in moved.items()}
        return found

    def _shown(self, whole: Paged, columns: Int[Tensor, "b t"], rows: np.ndarray | None) -> Bool[Tensor, "b t"]:
        """Slots that hold tokens, but no pads and no sinks."""
        slot = torch.arange(self.method.page, device=columns.device)
        used = torch.from_numpy(whole.used[:, 0].astype(np.int64)).to(columns.device)
        shown = (slot < used[..., None]).flatten(1)
        shown = shown if whole.valid is None else shown & whole.valid
        others = self.sinks.others(None, columns, rows)
        return shown if others is None else shown & others

    def _own_columns(self, part: Paged) -> Int[Tensor, "b t"]:
        """A row's own column of every slot."""
        slots = part.first[:, :, None] + np.arange(self.method.page)
        return torch.from_numpy(slots.reshape(len(slots), -1)).to(part.keys.device)

    def _columns(self, slot: Int[Tensor, " w"], rows: int) -> Int[Tensor, "b w"]:
        """A row's own columns of slots of the exact tokens."""
        shifts = np.zeros(rows, np.int64) if self.table.shifts is None else self.table.shifts
        return slot + self.first - torch.from_numpy(shifts).to(slot.device)[:, None]


def _placed(pages: Pages, chosen: Pages, rows: np.ndarray) -> Pages:
    """Pages with others in place of some rows."""
    rest = np.setdiff1d(np.arange(len(pages.table)), rows)
    order = np.argsort(np.concatenate([rest, rows]), kind="stable")
    return joined([pages.selected(rest), chosen]).selected(order)
