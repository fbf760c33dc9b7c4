"""The body of a layer: encoded pages by age. A method with one tier has pages of one age, and none ever moves.

Pages enter the youngest tier, those of images and videos a tier of their own where there is one. What a tier cannot
hold any more moves on, the oldest pages first, by a conversion of stored tensors (`Codec.truncate`): nothing is
decoded, and nothing is rounded a second time. A tier without codecs ends the ladder: its pages are dropped. Columns
ascend from the oldest tier of the ladder to the youngest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.snapshot import TierView
from kvshrink.methods._roles import Codec, Stored
from kvshrink.methods._tier import Tier
from kvshrink.shapes import Bool, Float
from kvshrink.store.bytes import nbytes
from kvshrink.store.lane_state import restored, state
from kvshrink.store.lanes import Pages
from kvshrink.store.names import under
from kvshrink.store.oldest import oldest
from kvshrink.store.ragged import Ragged
from kvshrink.store.rows import joined


@dataclass
class TierPages:
    """A tier and the pages in it, kept as what takes least."""

    tier: Tier
    kept: Pages | Ragged
    view: TierView | None = None  # of these pages: it keeps what it finds out, from step to step

    @property
    def pages(self) -> Pages:
        return self.kept if isinstance(self.kept, Pages) else self.kept.pages

    @pages.setter
    def pages(self, pages: Pages) -> None:
        self.kept = pages if pages.columns is None else Ragged.of(pages)
        self.view = None

    @property
    def limit(self) -> int | None:
        """Pages of a row that may be of this age; None: any number."""
        return None if self.tier.tokens is None else self.tier.tokens // self.pages.page


class Body:
    """All pages of a layer, of so many lanes a row. chooses: whether some tokens of each page are dropped."""

    def __init__(self, tiers: Sequence[Tier], page: int, lanes: int = 1, chooses: bool = False) -> None:
        self.page, self.lanes, self.chooses = page, lanes, chooses
        # the youngest first
        self.ages = [TierPages(tier, Pages.none(page, 1 if tier.every else lanes)) for tier in tiers]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "ages": [replace(age, view=None) for age in self.ages]}

    def __setstate__(self, own: dict[str, Any]) -> None:
        vars(self).update(own)
        for age in self.ages:
            for run in age.kept.runs:
                run.holders.add(self)

    @property
    def ladder(self) -> list[TierPages]:
        """The ages of what came from no image, the youngest first."""
        return [age for age in self.ages if not age.tier.beside]

    @property
    def youngest(self) -> Pages:
        return self.ages[0].pages

    @property
    def drops(self) -> bool:
        """Whether pages may be dropped."""
        return not self.holds_every and (self.chooses or self.ladder[-1].tier.codecs is None)

    @property
    def holds_every(self) -> bool:
        """Whether a tier beside the chosen tokens holds all of them."""
        return self.ages[-1].tier.every

    @property
    def room(self) -> int | None:
        """Pages of a row that are held at most; None: no limit."""
        *others, oldest = self.ladder
        return sum(age.limit or 0 for age in others) if oldest.tier.codecs is None else None

    @property
    def tokens(self) -> int:
        """Tokens of the row that holds most."""
        return sum(int(age.pages.tokens.max(initial=0)) for age in self.ages)

    def __len__(self) -> int:
        """Pages of the longest lane of each age."""
        return sum(len(age.kept) for age in self.ages)

    def view(self, base: Pages | None = None) -> tuple[TierView, ...]:
        """What is there now, the oldest first: it stays as it is. base: of the layer that this one follows."""
        found = []
        for age in reversed(self.ages):
            if age.tier.codecs is not None and len(age.kept):
                view = age.view
                if view is None or view.base is not base or (age.tier.every and self.ages[0].view is None):
                    pages = age.kept if isinstance(age.kept, Pages) else age.kept.read
                    shown = not_held_by(self.ages[0].pages, pages) if age.tier.every else None
                    view = age.view = TierView(age.tier.codecs, pages, base, shown)
                found.append(view)
        return tuple(found)

    @property
    def slots(self) -> int:
        """Slots of all lanes, dead ones included."""
        return sum(int(age.pages.counts.sum()) for age in self.ages) * self.page

    # --- changes ---

    def hold(self, age: TierPages, pages: Pages, trim: bool = True) -> None:
        """Take pages in place of an age's own."""
        for run in set(pages.runs).difference(age.kept.runs):
            run.holders.add(self)
        age.pages = pages.trimmed(self) if trim else pages

    def append(
        self,
        parts: Iterable[Stored],
        first: np.ndarray,
        used: np.ndarray,
        rows: np.ndarray | None,
        batch: int,
        beside: bool = False,
    ) -> None:
        """Add whole pages of some rows (None: all) from parts as they come. first [rows, p], used [rows, L, p]: the
        column of each page's first slot and how many of its slots are filled. batch: rows in all. beside: to the tier
        of images, or of every token."""
        for age in self.ages:
            if not len(age.kept):
                age.pages = age.pages.for_rows(batch)
        if beside or len(self.ladder) == 1:
            age = self.ages[-1 if beside else 0]
            self.hold(age, age.pages.appended(parts, first.shape[1], first, used, rows), trim=False)
            return
        at = 0
        for part in parts:
            count = next(iter(part.values())).shape[1]
            cut = slice(at, at := at + count)
            pages = self.youngest.appended([part], count, first[:, cut], used[:, :, cut], rows)
            self.hold(self.ages[0], pages, trim=False)
            self._grow_old()

    def _grow_old(self) -> None:
        for young, old in pairwise(self.ladder):
            if young.limit is None:
                continue
            beyond = np.maximum(0, young.pages.counts[:, 0] - young.limit)
            if not beyond.any():
                continue
            leaving, staying = oldest(young.pages, beyond)
            if old.tier.codecs is not None:
                for count in np.unique(beyond[beyond > 0]):  # joined rows may give different numbers of pages
                    rows = np.nonzero(beyond == count)[0]
                    every = len(rows) == len(beyond)
                    own = leaving if every else leaving.selected(rows)
                    parts = [truncated(dict(own.records()), old.tier.codecs)]
                    pages = old.pages.appended(parts, len(own), own.first, own.used, None if every else rows)
                    self.hold(old, pages, trim=False)
            self.hold(young, staying)

    def add_importance(self, more: Float[Tensor, "b h slots"], fade: float = 1.0) -> None:
        """To that of the stored tokens times `fade`, by KV head: a lane has the mean of its heads."""
        kept = self.ages[0].kept
        assert isinstance(kept, Ragged)
        own = more.unflatten(1, (self.lanes, -1)).mean(2)
        self.ages[0].kept, self.ages[0].view = kept.more_important(own, fade), None

    def crop(self, lengths: np.ndarray) -> None:
        """Forget a row's columns from its length on. What has grown old stays so."""
        for age in self.ages:
            if len(age.pages):
                self.hold(age, age.pages.cropped(lengths))

    def select(self, index: Tensor) -> None:
        for age in self.ages:
            if len(age.pages):
                self.hold(age, age.pages.selected(index.cpu().numpy()))

    def to(self, device: torch.device | str) -> None:
        for age in self.ages:
            if len(age.pages):
                self.hold(age, age.pages.to(device), trim=False)

    def fork(self) -> "Body":
        """Another body of the same pages, which shares their records."""
        other = Body([age.tier for age in self.ages], self.page, self.lanes, self.chooses)
        for own, age in zip(other.ages, self.ages, strict=True):
            own.kept = age.kept
            for run in age.kept.runs:
                run.holders.add(other)
        return other

    @classmethod
    def joined(cls, bodies: Sequence["Body"], rows: Sequence[int]) -> "Body":
        """The rows of all, one below the other; rows: how many each has."""
        some = bodies[0]
        other = cls([age.tier for age in some.ages], some.page, some.lanes, some.chooses)
        for i, age in enumerate(other.ages):
            parts = [body.ages[i].pages.for_rows(b) for body, b in zip(bodies, rows, strict=True)]
            other.hold(age, joined(parts), trim=False)
        return other

    # --- bytes and state ---

    def tensors(self) -> list[Tensor]:
        return [t for age in self.ages for t in age.pages.tensors()]

    def metadata(self) -> int:
        """Bytes of scales, minima and the like in all records taken."""
        found = 0
        for age in self.ages:
            names = {f"{s}.{n}" for s, c in zip("kv", age.tier.codecs or (), strict=False) for n in c.metadata}
            fields = age.pages.layout.fields if age.pages.layout is not None else {}
            own = sum(field.nbytes for name, field in fields.items() if name in names)
            found += own * sum(len(run.data) for run in age.pages.runs)
        return found

    @property
    def index_bytes(self) -> int:
        made = [age.view.shown for age in self.ages if age.view is not None and age.view.shown is not None]
        return sum(age.kept.index_bytes for age in self.ages) + nbytes(made)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain values, tensors): the youngest tier as "pages", and the older ones."""
        plain: dict[str, Any] = {}
        found: dict[str, Tensor] = {}
        for i, age in enumerate(self.ages):
            name = f"older.{i - 1}" if i else "pages"
            values, tensors = state(age.pages)
            plain[name] = values
            found |= {f"{name}.{k}": t for k, t in tensors.items()}
        return plain, found

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], empty: Sequence[Stored | None]) -> None:
        """From what `state` gave, and more. empty: one page as each tier lays it out, None where it is dropped."""
        for i, (age, page) in enumerate(zip(self.ages, empty, strict=True)):
            name = f"older.{i - 1}" if i else "pages"
            pages = age.pages if page is None else restored(age.pages, values[name], under(tensors, f"{name}."), page)
            self.hold(age, pages, trim=False)


def not_held_by(chosen: Pages, every: Pages) -> Bool[Tensor, "b L t"]:
    """Which slots of all tokens' pages are of tokens that a lane has not chosen."""
    own = every.all_slots()[:, 0].to(every.device).long()  # a row's columns, -1: none
    if not len(chosen):
        return (own >= 0)[:, None]
    columns = chosen.slots.to(own.device).long()
    held = torch.zeros(*columns.shape[:2], int(max(own.max(), columns.max())) + 2, dtype=torch.bool, device=own.device)
    held.scatter_(2, columns.where(columns >= 0, held.shape[2] - 1), True)
    return ~held.gather(2, own.clamp_min(0)[:, None].expand(-1, columns.shape[1], -1)) & (own >= 0)[:, None]


def truncated(extent: Stored, codecs: tuple[Codec, Codec]) -> Stored:
    """What the codecs of an older tier keep of a younger one's pages, keys and values."""
    found: dict[str, Tensor] = {}
    for prefix, codec in zip(("k.", "v."), codecs, strict=True):
        own = under(extent, prefix)
        found |= {f"{prefix}{k}": t for k, t in codec.truncate(own).items()}
    return found
