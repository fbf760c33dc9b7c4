"""What a cache layer must show, worked out again with plain lists of tokens and the written rules.

The rules: at least `window` recent tokens are exact; when more than `window + page` tokens are, the oldest leave in
whole pages, but while sinks are still wanted, leading columns that are a pad or a sink in every row leave without a
page; the first `sinks` real tokens of a row stay exact for ever; a crop shortens what is there, and nothing is encoded
twice. Pages have an age: what an age cannot hold any more, the oldest first, gets the next one, after the last one it
is gone. A pad is any column that the mask hides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

# keys, values [b, h, t, d], positions [b, t] (-1 at pads) -> keys and values as they come back from their pages
Lossy = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Token(NamedTuple):
    """A column of one row; a pad has position -1."""

    column: int
    position: int
    key: np.ndarray  # [h, d], as attention uses it
    value: np.ndarray


class Age(NamedTuple):
    """What pages of an age come back as, and how many may be of this age (None: any number)."""

    lossy: Lossy
    pages: int | None = None


@dataclass
class Page:
    """The tokens of a page as they come back at each age, and which age it has."""

    looks: list[list[Token]]
    age: int = 0

    def copy(self) -> "Page":
        return Page([list(tokens) for tokens in self.looks], self.age)

    def cut(self, length: int) -> "Page":
        return Page([[t for t in tokens if t.column < length] for tokens in self.looks], self.age)

    @property
    def tokens(self) -> list[Token]:
        return self.looks[self.age]


class Dense(NamedTuple):
    """All columns of a layer, and which of them attention may read."""

    keys: np.ndarray  # [b, h, seen, d]
    values: np.ndarray
    shown: np.ndarray  # bool [b, seen]


@dataclass
class Row:
    """One sequence of the batch."""

    real: list[bool] = field(default_factory=list)  # per column: no pad
    sinks: list[Token] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    window: list[Token] = field(default_factory=list)

    def copy(self) -> "Row":
        return Row(list(self.real), list(self.sinks), [p.copy() for p in self.pages], list(self.window))

    def wanted(self, sinks: int) -> list[int]:
        """Columns of the first real tokens."""
        return list(islice((column for column, real in enumerate(self.real) if real), sinks))

    def shown(self, sinks: int) -> list[Token]:
        """Real tokens, each once: a sink is read exactly, never from its page."""
        wanted = self.wanted(sinks)
        body = [t for page in self.pages for t in page.tokens if t.column not in wanted]
        return [t for t in (*self.sinks, *body, *self.window) if t.position >= 0]


class Oracle:
    """One layer of h heads and d channels. `ages` of pages, the youngest first; without any, tokens are dropped."""

    def __init__(self, window: int, sinks: int, page: int, h: int, d: int, ages: list[Age]) -> None:
        self.settings = (window, sinks, page, h, d, ages)
        self.window, self.sinks, self.page, self.h, self.d, self.ages = self.settings
        self.rows: list[Row] = []
        self.seen = 0
        self.took_sinks = False  # storage for sinks is taken with the first spill
        self.full = sinks == 0  # no row wants a sink any more; batch operations do not look again

    def extend(self, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> None:
        """New tokens [b, h, s, d] join the window; a position of -1 is a pad."""
        if self.seen == 0:
            self.rows = [Row() for _ in positions]
        for row, k, v, p in zip(self.rows, keys, values, positions, strict=True):
            row.real += [bool(x >= 0) for x in p]
            row.window += [Token(self.seen + i, int(p[i]), k[:, i], v[:, i]) for i in range(len(p))]
        self.seen += positions.shape[1]

    def spill(self) -> None:
        """Let whole pages leave a window that has grown beyond `window + page`."""
        held = self.exact
        if held <= self.window + self.page:
            return
        first, spare = self.seen - held, held - self.window
        wanted, no_page = [row.wanted(self.sinks) for row in self.rows], 0
        while not self.full and no_page < spare:
            column = first + no_page
            if any(row.real[column] and column not in w for row, w in zip(self.rows, wanted, strict=True)):
                break
            no_page += 1
        out = no_page + (spare - no_page) // self.page * self.page
        self.took_sinks |= self.sinks > 0
        for row, columns in zip(self.rows, wanted, strict=True):
            row.sinks += [t for t in row.window[:out] if t.column in columns]
        self.look_for_sinks()
        if self.ages and out > no_page:
            self._encode(no_page, out)
            for row in self.rows:
                self._grow_old(row)
        for row in self.rows:
            del row.window[:out]

    def look_for_sinks(self) -> None:
        self.full = self.sinks == 0 or (self.took_sinks and all(len(row.sinks) == self.sinks for row in self.rows))

    def _encode(self, start: int, end: int) -> None:
        tokens = [row.window[start:end] for row in self.rows]
        keys = np.stack([np.stack([t.key for t in row], 1) for row in tokens])
        values = np.stack([np.stack([t.value for t in row], 1) for row in tokens])
        positions = np.array([[t.position for t in row] for row in tokens], np.int32)
        looks = [age.lossy(keys, values, positions) for age in self.ages]
        for n, (row, old) in enumerate(zip(self.rows, tokens, strict=True)):
            new = [[Token(t.column, t.position, k[n][:, i], v[n][:, i]) for i, t in enumerate(old)] for k, v in looks]
            row.pages += [Page([x[i : i + self.page] for x in new]) for i in range(0, len(old), self.page)]

    def _grow_old(self, row: Row) -> None:
        for number, age in enumerate(self.ages):
            same = [page for page in row.pages if page.age == number]
            for page in same[: len(same) if age.pages is None else max(0, len(same) - age.pages)]:
                page.age += age.pages is not None
        row.pages = [page for page in row.pages if page.age < len(self.ages)]

    def crop(self, count: int) -> None:
        """Take the last `count` columns back; taking all of them back is starting anew."""
        self.seen -= count
        self.rows = self.rows if self.seen else []
        for row in self.rows:
            del row.real[self.seen :]
            row.sinks = [t for t in row.sinks if t.column < self.seen]
            row.window = [t for t in row.window if t.column < self.seen]
            row.pages = [cut for page in row.pages if (cut := page.cut(self.seen)).tokens]
        self.took_sinks &= self.seen > 0
        self.look_for_sinks()

    def select(self, indices: list[int]) -> None:
        self.rows = [self.rows[i].copy() for i in indices]

    def copy(self) -> "Oracle":
        other = Oracle(*self.settings)
        other.rows, other.seen = [r.copy() for r in self.rows], self.seen
        other.took_sinks, other.full = self.took_sinks, self.full
        return other

    @property
    def exact(self) -> int:
        """Tokens in the window."""
        return len(self.rows[0].window) if self.rows else 0

    @property
    def pages(self) -> int:
        return len(self.rows[0].pages) if self.rows else 0

    @property
    def recent(self) -> int:
        """Tokens in window and pages."""
        return self.exact + (sum(len(page.tokens) for page in self.rows[0].pages) if self.rows else 0)

    def dense(self) -> Dense:
        """What is there, column by column; zero where nothing is shown."""
        keys = np.zeros((len(self.rows), self.h, self.seen, self.d), np.float32)
        values, shown = keys.copy(), np.zeros((len(self.rows), self.seen), bool)
        for i, row in enumerate(self.rows):
            tokens = row.shown(self.sinks)
            columns = [t.column for t in tokens]
            assert len(set(columns)) == len(columns), "the oracle itself shows a token twice"
            if tokens:
                keys[i][:, columns] = np.stack([t.key for t in tokens], 1)
                values[i][:, columns] = np.stack([t.value for t in tokens], 1)
                shown[i, columns] = True
        return Dense(keys, values, shown)


def attention(query: np.ndarray, dense: Dense, scaling: float, softcap: float | None) -> np.ndarray:
    """Plain causal softmax attention in float64: the last s columns' queries [b, q, s, d] over the shown tokens."""
    s, seen, members = query.shape[2], dense.keys.shape[2], query.shape[1] // dense.keys.shape[1]
    keys, values = (x.repeat(members, 1).astype(float) for x in (dense.keys, dense.values))
    scores = query.astype(float) @ keys.swapaxes(-1, -2) * scaling
    if softcap is not None:
        scores = np.tanh(scores / softcap) * softcap
    visible = dense.shown[:, None, None, :] & (np.arange(seen) <= np.arange(seen - s, seen)[:, None])
    scores = np.where(visible, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * visible
    return weights @ values / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
