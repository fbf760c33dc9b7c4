"""One step's move from a layer's window to its sinks and body: what leaves is encoded, or chosen from, and kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvshrink.cache.body import Body
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.encode import ENCODE_TOKENS, encode
from kvshrink.cache.eviction import Choosing
from kvshrink.cache.leaving import (
    Leaving,
    Paged,
    by_kind,
    cut,
    kinds,
    leavings,
    left,
    of_images,
    own_columns,
    paged,
    picked,
    quiet,
    spread,
)
from kvshrink.cache.matching import Matching, Rest, behind
from kvshrink.cache.rope import as_stored, plain
from kvshrink.cache.scoring import received
from kvshrink.cache.sinks import Sinks
from kvshrink.cache.snapshot import Snapshot
from kvshrink.cache.step import Staged
from kvshrink.cache.stored_scores import stored_scores
from kvshrink.cache.window import Window
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Policy, Scorer
from kvshrink.methods._roles import Codec, Method, Stored
from kvshrink.shapes import Float, Int
from kvshrink.store.lanes import Pages
from kvshrink.store.names import under
from kvshrink.store.tokens import TokenTable


@dataclass(frozen=True)
class Leave:
    """What a layer's tokens leave into, and how. base: pages of the layer that this one is stored as a delta to."""

    method: Method
    policy: Policy
    codecs: tuple[Codec, Codec] | None
    beside: tuple[Codec, Codec] | None  # of pages of images, or of every token beside the chosen ones
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

    def rank(self, staged: Staged, keys: Tensor, values: Tensor, new: int) -> Float[Tensor, "b h t"] | None:
        """Importance of the exact tokens, where something asks for it and it is known."""
        scorer, probe = self.policy.scorer, staged.probe_queries
        if scorer is None or (scorer.asks and probe is None):
            return None
        if not scorer.asks and not scorer.remembers and self._quiet(keys.shape[2]):
            return None
        seen, stored = self._evidence(scorer, staged, keys, values, new)
        ranked = scorer.importance(seen)
        fade = scorer.decay**new
        if scorer.keeps == "own":
            ranked = pad(ranked, (keys.shape[2] - new, 0))
        if scorer.remembers:
            ranked = self.window.add_scores(ranked, fade)
        chosen = len(self.body.ages[0].kept) * self.method.page
        if stored is not None and chosen and scorer.keeps in ("sum", "latest"):  # the youngest tier's are the last
            own = scorer.of_stored(stored[..., stored.shape[2] - chosen :])
            self.body.add_importance(own, fade if scorer.keeps == "sum" else 0.0)
        return ranked

    def _evidence(
        self, scorer: Scorer, staged: Staged, keys: Tensor, values: Tensor, new: int
    ) -> tuple[Evidence, Float[Tensor, "b h slots"] | None]:
        """What is known of the exact tokens, and what stored ones got."""
        before, probe, rope, got = self.before, staged.probe_queries, self.before.rope, None
        positions = before.positions[:, before.first :]
        if before.starts is not None:  # of a joined row: what stands before its own tokens is in its pages
            slots = torch.arange(keys.shape[2], device=positions.device)
            positions = positions.masked_fill(slots < before.starts[:, None], -1)
        real = positions >= 0
        if probe is not None and scorer.asks and scorer.reduce is not None:
            reads = scorer.everything and before.held_tokens > 0
            stored = partial(stored_scores, before, probe.softcap) if reads else lambda _: ()
            tokens = before.held_tokens if reads else 0
            got = received(probe, keys, real, new, stored, tokens, scorer.reduce, scorer.weights(new))
        seen = Evidence(
            keys,
            values,
            positions,
            real,
            new,
            mass=None if got is None else got.mass,
            seen=None if got is None else got.seen,
            asked=None if probe is None else probe.queries,
            asked_rows=None if probe is None else probe.rows,
            undo=None if rope is None else rope.undo,
            turn=None if rope is None else rope.apply,
            hidden=staged.hidden,
            order=positions if rope is None or rope.long is None else plain(positions),
            judged=None if staged.judged is None else staged.judged.heard.scores,
        )
        return seen, None if got is None else got.stored

    def _quiet(self, slots: int) -> bool:
        """Whether no page leaves in this step, as far as can be told at once."""
        alike = self.window.starts is None and self.table.shifts is None
        return alike and quiet(self.first, self.first + slots, self.method.window, self.method.page)

    def run(
        self, keys: Tensor, values: Tensor, ranked: Float[Tensor, "b h t"] | None, new: int, staged: Staged
    ) -> None:
        """Move what leaves of these exact tokens to sinks and body; the window keeps the rest. new: of the step."""
        window, page, slots = self.method.window, self.method.page, keys.shape[2]
        starts = self.window.starts
        if self._quiet(slots):
            return
        lengths = self.table.lengths
        exact = np.minimum(lengths, slots - (0 if starts is None else starts))
        positions = self.before.positions[:, self.first :]
        if ranked is not None and staged.judged is not None:  # what always stays does so by any measure
            ranked = ranked - staged.judged.least[..., None]
        for leaving in leavings(lengths, exact, slots, window, page):
            self._capture(leaving, keys, values)
            if self.codecs is not None:
                self._store(leaving, keys, values, positions, ranked, new, staged)
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
        new: int,
        staged: Staged,
    ) -> None:
        """Encode what leaves, some pages at a time, into the body."""
        page = self.method.page
        if importance is None and self.policy.budget is not None:  # no queries are known: all alike
            importance = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        whole = paged(leaving, keys, values, positions, self.table.padded, page, self.body.lanes)
        own = None if importance is None else spread(leaving.of(importance), leaving, page)
        columns = spread(leaving.of(positions, 1), leaving, page)
        if self.policy.budget is not None:
            assert own is not None
            assert self.codecs is not None
            rope, matching = self.before.rope, self._matching(leaving, keys, values, positions, staged)
            parts = (self.method, self.policy, self.codecs, self.table, self.sinks, self.body, self.watch)
            chosen = Choosing(*parts, rope, matching)
            chosen.run(leaving.rows, whole, columns, own, len(keys), new)
            if self.beside is not None:
                one = whole._replace(used=whole.used[:, :1])
                self._append(one, columns, own, leaving.rows, len(keys), beside=True)
        elif self.beside is None or self.table.visual is None:
            self._append(whole, columns, own, leaving.rows, len(keys))
        else:
            self._append_by_kind(leaving, whole, columns, own, len(keys))

    def _matching(
        self, leaving: Leaving, keys: Tensor, values: Tensor, positions: Tensor, staged: Staged
    ) -> Matching | None:
        """By what the tokens that stay are changed, where they are and the model read them again: of a first prompt."""
        heard = None if staged.judged is None else staged.judged.heard
        if not self.policy.matches or heard is None or heard.queries is None or len(self.body.youngest):
            return None
        rows = np.arange(len(keys)) if leaving.rows is None else leaving.rows
        own = torch.from_numpy(rows).to(keys.device)
        real = positions[own] >= 0
        real[:, : leaving.stop] = False  # before them are the junk of joined rows and what left
        rest = Rest(keys[own], values[own], real)
        if self.sinks.keys is not None and self.sinks.values is not None and self.sinks.columns is not None:
            sinks = self.sinks.keys[own], self.sinks.values[own], self.sinks.columns[own] >= 0
            rest = Rest(*(torch.cat(x, -1 if x[0].dim() == 2 else 2) for x in zip(sinks, rest, strict=True)))
        rope, last = self.before.rope, positions[own].amax(1)
        queries = heard.queries[own]
        if rope is not None and heard.positions is not None and heard.reach is not None:
            queries = behind(queries, rope.of_prompt(heard.positions[own], heard.reach[own]), last, rope)
        return Matching(queries, rest, heard.softcap, None if heard.sinks is None else heard.sinks[own])

    def _append(
        self,
        whole: Paged,
        positions: Tensor,
        importance: Tensor | None,
        rows: np.ndarray | None,
        batch: int,
        beside: bool = False,
    ) -> None:
        """Encode pages of some rows (None: all), some at a time, into the body."""
        parts = list(self._parts(whole, positions, importance))
        if parts:
            skip = whole.first.shape[1] - sum(p.first.shape[1] for p, _, _ in parts)
            encoded = (self._encode(*part, rows, beside) for part in parts)
            self.body.append(encoded, whole.first[:, skip:], whole.used[:, :, skip:], rows, batch, beside)

    def _append_by_kind(
        self, leaving: Leaving, whole: Paged, positions: Tensor, importance: Tensor | None, batch: int
    ) -> None:
        """The same, pages of images by themselves."""
        page, every = self.method.page, np.arange(len(whole.first)) if leaving.rows is None else leaving.rows
        marks = of_images(self.table, own_columns(whole, page), every)
        for visual, rows, pages in by_kind(kinds(whole, marks, page)):
            keys, values = (picked(x, rows, pages, page, 2) for x in (whole.keys, whole.values))
            valid = None if whole.valid is None else picked(whole.valid, rows, pages, page, 1)
            of_pages = np.ix_(rows, pages)
            part = Paged(keys, values, valid, whole.first[of_pages], whole.used.swapaxes(1, 2)[of_pages].swapaxes(1, 2))
            own = None if importance is None else picked(importance, rows, pages, page, importance.dim() - 1)
            at = picked(positions, rows, pages, page, 1)
            chosen = None if len(rows) == batch and leaving.rows is None else every[rows]
            self._append(part, at, own, chosen, batch, visual)

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
        self, part: Paged, positions: Tensor, importance: Tensor | None, rows: np.ndarray | None, beside: bool = False
    ) -> dict[str, Tensor]:
        codecs = self.beside if beside else self.codecs
        assert codecs is not None
        keys = as_stored(codecs[0], part.keys, positions, self.before.rope)
        stored = encode(codecs, keys, part.values, part.valid, importance, self._base_of(part))
        if self.watch is not None and not beside:
            self.watch.add(keys, part.values, self.sinks.others(part.valid, own_columns(part, self.method.page), rows))
        return stored

    def _base_of(self, part: Paged) -> Callable[[str], Stored] | None:
        """The pages of the same tokens in the layer that this one is a delta to, by "k." and "v."."""
        if self.base is None:
            return None
        start = int(np.nonzero(self.base.first[0] == part.first[0, 0])[0][-1])
        return partial(under, dict(self.base.records(start, start + part.first.shape[1])))

    def _columns(self, slot: Int[Tensor, " w"], rows: int) -> Int[Tensor, "b w"]:
        """A row's own columns of slots of the exact tokens."""
        shifts = np.zeros(rows, np.int64) if self.table.shifts is None else self.table.shifts
        return slot + self.first - torch.from_numpy(shifts).to(slot.device)[:, None]
