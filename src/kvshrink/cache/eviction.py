"""Which of the tokens that leave the window are stored, and which stored ones make room: by a Policy, lane by lane.

What leaves is chosen while it is exact, and only what stays is encoded. Stored tokens may go later where their codec
can move the others; where it cannot, what was stored once stays.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.body import Body
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.encode import ENCODE_TOKENS, encode
from kvshrink.cache.leaving import Paged, left, of_images, own_columns
from kvshrink.cache.matching import Matching
from kvshrink.cache.merging import merged
from kvshrink.cache.rope import Rope, as_stored
from kvshrink.cache.sinks import Sinks
from kvshrink.methods._abilities import MovesSlots, find
from kvshrink.methods._policy import Policy
from kvshrink.methods._roles import Codec, Method, Stored
from kvshrink.shapes import Bool, Float, Int
from kvshrink.store.choosing import added, kept, most_important, slots_of
from kvshrink.store.lanes import Pages
from kvshrink.store.names import under
from kvshrink.store.rows import joined
from kvshrink.store.tokens import TokenTable


class Candidates(NamedTuple):
    """Tokens of some rows that may stay: those stored, in the first `before` slots, and those that leave now. -inf: no
    token."""

    importance: Float[Tensor, "b L t"]
    columns: Int[Tensor, "b L t"]
    before: int


class Fresh(NamedTuple):
    """What stays of what leaves now, in whole pages by lane; columns -1 where there is none."""

    keys: Float[Tensor, "b h k d"]
    values: Float[Tensor, "b h k e"]
    valid: Bool[Tensor, "b k"] | None
    by_head: Float[Tensor, "b h k"]
    columns: Int[Tensor, "b L k"]
    importance: Float[Tensor, "b L k"]


@dataclass(frozen=True)
class Choosing:
    """A step's choice in one layer."""

    method: Method
    policy: Policy
    codecs: tuple[Codec, Codec]
    table: TokenTable
    sinks: Sinks
    body: Body
    watch: DriftWatch | None
    rope: Rope | None
    matching: Matching | None = None

    def run(
        self,
        rows: np.ndarray | None,
        whole: Paged,
        positions: Int[Tensor, "b t"],
        importance: Float[Tensor, "b h t"],
        batch: int,
        new: int,
    ) -> None:
        """Keep the most important of what these rows hold (None: all rows) and of what leaves now. batch: rows in all;
        new: tokens of the step."""
        every = np.arange(batch) if rows is None else rows
        pages = self.body.youngest.for_rows(batch)
        old = pages if rows is None else pages.selected(rows)
        found = self._candidates(old, whole, importance, rows, every)
        stays = self._staying(found, every, new)
        mine, theirs = stays[..., : found.before], stays[..., found.before :]
        fresh = self._fresh(theirs, found, whole, positions, importance)
        stored = self._encoded(fresh)
        if bool((mine | (found.importance[..., : found.before] == -torch.inf)).all()):
            chosen = added(old, stored, fresh.columns, fresh.importance)
        else:
            chosen = kept(old, stored, fresh.columns, fresh.importance, mine, self._move)
        self.body.hold(self.body.ages[0], chosen if rows is None else _placed(pages, chosen, rows))

    @property
    def movable(self) -> bool:
        """Whether stored tokens may go."""
        return all(find(codec, MovesSlots) is not None for codec in self.codecs)  # type: ignore[type-abstract]

    def _candidates(
        self, old: Pages, whole: Paged, importance: Tensor, rows: np.ndarray | None, every: np.ndarray
    ) -> Candidates:
        columns = own_columns(whole, self.method.page).int()
        shown = self._shown(whole, columns, rows)
        fresh = importance.unflatten(1, (self.body.lanes, -1)).mean(2)
        if self.policy.protect:
            first = self._protected(columns, every)
            fresh = torch.where(first[:, None], torch.inf, fresh)
        fresh = fresh.masked_fill(~shown[:, None], -torch.inf)
        columns = columns[:, None].expand(fresh.shape)
        if not len(old) or old.columns is None or old.importance is None:
            return Candidates(fresh, columns, 0)
        before = old.importance if self.movable else torch.full_like(old.importance, torch.inf)
        before = before.masked_fill(old.columns < 0, -torch.inf)
        return Candidates(torch.cat([before, fresh], 2), torch.cat([old.columns, columns], 2), before.shape[2])

    def _staying(self, found: Candidates, rows: np.ndarray, new: int) -> Bool[Tensor, "b L t"]:
        """Which candidates stay, those of images under a budget of their own where there is one."""
        importance, there, page = found.importance, found.importance > -torch.inf, self.method.page
        budget, other = self.policy.budget, self.policy.visual
        assert budget is not None
        if not self.policy.drops_now(new):  # what is decoded stays; where it is held anyway, it is not chosen
            old = torch.arange(there.shape[2], device=there.device) < found.before
            return there & old if self.policy.demotes else there
        gone = torch.from_numpy(left(self.table.lengths[rows], self.method.window, page) // page)
        if other is None or self.table.visual is None:
            parts = [(budget, there, gone)]
        else:
            marks = of_images(self.table, found.columns.flatten(1), rows).view(there.shape)
            images = self._pages_of_images(rows, int(gone.max()) * page, gone * page)
            parts = [(budget, there & ~marks, gone - images), (other, there & marks, images)]
        stays, room = torch.zeros_like(there), torch.zeros_like(there[..., 0], dtype=torch.long)
        for part, of, pages in parts:
            own = importance.masked_fill(~of, -torch.inf)
            always = -(-(own == torch.inf).sum(-1) // page) * page
            counts = part.counts(own, pages, page).maximum(always)
            stays, room = stays | most_important(own, counts), room + counts
        schedule = self.policy.schedule
        if isinstance(schedule, int) and new == 1:  # until there is so much more than that
            few = there.sum(-1) <= room + schedule
            stays = torch.where(few[..., None], there, stays)
        return stays

    def _pages_of_images(self, rows: np.ndarray, most: int, gone: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """How many of the pages that left are of images, by their tokens."""
        every = torch.arange(most, device=self.table.positions.device)
        inside = every < gone.to(every.device)[:, None]
        marks = of_images(self.table, every.expand(len(rows), -1), rows)
        return (marks & inside).sum(1).cpu() // self.method.page

    def _fresh(
        self,
        stays: Bool[Tensor, "b L t"],
        found: Candidates,
        whole: Paged,
        positions: Int[Tensor, "b t"],
        importance: Float[Tensor, "b h t"],
    ) -> Fresh:
        index = slots_of(stays, self.method.page)
        keys, values = whole.keys, whole.values
        real = found.importance[..., found.before :] > -torch.inf
        if self.matching is not None:
            keys, values = self.matching.run(keys, values, stays, real)
        elif self.policy.merges:
            values = merged(keys, values, stays, real)
        there, slots = index >= 0, torch.where(index >= 0, index, index[..., :1].clamp_min(0))
        own = [x[..., found.before :].gather(2, slots) for x in (found.columns, found.importance)]
        valid = there[:, 0] if self.body.lanes == 1 and not bool(there.all()) else None
        some, at = there.any(2, keepdim=True), positions[:, None].expand(own[0].shape[:2] + positions.shape[1:])
        keys = self._as_stored(_of_lanes(keys, slots, some), at.gather(2, slots))
        return Fresh(
            keys,
            _of_lanes(values, slots, some),
            valid,
            _of_lanes(importance[..., None], slots, some)[..., 0],
            own[0].masked_fill(~there, -1),
            own[1].masked_fill(~there, -torch.inf),
        )

    def _as_stored(self, keys: Float[Tensor, "b h k d"], positions: Int[Tensor, "b L k"]) -> Float[Tensor, "b h k d"]:
        """Keys as their codec stores them, where each lane has positions of its own."""
        codec, lanes = self.codecs[0], positions.shape[1]
        if lanes == 1:
            return as_stored(codec, keys, positions[:, 0], self.rope)
        by_lane = keys.unflatten(1, (lanes, -1)).flatten(0, 1)
        found: Tensor = as_stored(codec, by_lane, positions.flatten(0, 1), self.rope)
        rows: Tensor = found.unflatten(0, (-1, lanes)).flatten(1, 2)
        return rows

    def _encoded(self, fresh: Fresh) -> Stored:
        """Pages of what stays, some at a time; none: an empty mapping."""
        parts = []
        for at in range(0, fresh.keys.shape[2], ENCODE_TOKENS):
            cut = slice(at, at + ENCODE_TOKENS)
            valid = None if fresh.valid is None else fresh.valid[:, cut]
            keys, values = fresh.keys[:, :, cut], fresh.values[:, :, cut]
            parts.append(encode(self.codecs, keys, values, valid, fresh.by_head[:, :, cut], None))
            if self.watch is not None:
                self.watch.add(keys, values, valid)
        return {k: torch.cat([part[k] for part in parts], 1) for k in parts[0]} if parts else {}

    def _move(self, stored: Stored, index: Int[Tensor, "b L k"]) -> Stored:
        """Whole pages made of these slots, for each lane its own."""
        found: dict[str, Tensor] = {}
        for prefix, codec in zip(("k.", "v."), self.codecs, strict=True):
            own = under(stored, prefix)
            if not own:  # joint: with the keys
                continue
            able = find(codec, MovesSlots)  # type: ignore[type-abstract]  # mypy takes no abstract class as a value
            assert able is not None, "what cannot move always stays"
            found |= {f"{prefix}{k}": t for k, t in able.moved(own, index).items()}
        return found

    def _shown(self, whole: Paged, columns: Int[Tensor, "b t"], rows: np.ndarray | None) -> Bool[Tensor, "b t"]:
        """Slots that hold tokens, but no pads and no sinks."""
        slot = torch.arange(self.method.page, device=columns.device)
        used = torch.from_numpy(whole.used[:, 0].astype(np.int64)).to(columns.device)
        shown = (slot < used[..., None]).flatten(1)
        shown = shown if whole.valid is None else shown & whole.valid
        others = self.sinks.others(None, columns, rows)
        return shown if others is None else shown & others

    def _protected(self, columns: Int[Tensor, "b t"], rows: np.ndarray) -> Bool[Tensor, "b t"]:
        """Which of a row's own columns are among its first tokens that always stay."""
        real = self.table.positions_on(columns.device)[torch.from_numpy(rows).to(columns.device)] >= 0
        first = real.byte().argmax(1)
        if self.table.shifts is not None:
            first = first - torch.from_numpy(self.table.shifts[rows]).to(first.device)
        return columns < (first + self.policy.protect)[:, None]


def _of_lanes(
    rows: Float[Tensor, "b h t d"], slots: Int[Tensor, "b L k"], some: Bool[Tensor, "b L 1"]
) -> Float[Tensor, "b h k d"]:
    """Of each lane its own slots; zeros where a lane has none."""
    by_lane = rows.unflatten(1, (slots.shape[1], -1))
    found: Tensor = by_lane.take_along_dim(slots[:, :, None, :, None].long(), 3)
    if not bool(some.all()):
        found = found.masked_fill(~some[..., None, None], 0.0)
    return found.flatten(1, 2)


def _placed(pages: Pages, chosen: Pages, rows: np.ndarray) -> Pages:
    """Pages with others in place of some rows."""
    rest = np.setdiff1d(np.arange(len(pages.table)), rows)
    order = np.argsort(np.concatenate([rest, rows]), kind="stable")
    return joined([pages.selected(rest), chosen]).selected(order)
