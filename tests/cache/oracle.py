"""What a cache layer must show, worked out again with plain lists of tokens and the written rules.

The rules: of a row of n tokens the pages before (n - window) // page, counted from its own first column, have left
the window, and the others are exact; a page that a crop has cut short stays so, and another one takes the rest of its
columns when they leave; the first `sinks` real tokens of a row stay exact for ever; nothing is encoded twice. Pages
have an age: what an age cannot hold any more, the oldest first, gets the next one, after the last one it is gone. A
pad is any column that the mask hides. Joined rows end together; each has columns of its own.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

# keys, values [b, h, t, d], positions [b, t] (-1 at pads) -> keys and values as they come back from their pages
Lossy = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Token(NamedTuple):
    """A row's own column; a pad has position -1."""

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
    """The tokens of a page as they come back at each age, which age it has, and which record it is, shared or not."""

    looks: list[list[Token]]
    age: int = 0
    record: int = field(default_factory=itertools.count().__next__)

    def copy(self) -> "Page":
        return Page([list(tokens) for tokens in self.looks], self.age, self.record)

    def cut(self, length: int) -> "Page":
        return Page([[t for t in tokens if t.column < length] for tokens in self.looks], self.age, self.record)

    @property
    def tokens(self) -> list[Token]:
        return self.looks[self.age]


class Dense(NamedTuple):
    """All columns of a layer, and which of them attention may read."""

    keys: np.ndarray  # [b, h, seen, d]
    values: np.ndarray
    shown: np.ndarray  # bool [b, h, seen]


@dataclass
class Row:
    """One sequence of the batch."""

    real: list[bool] = field(default_factory=list)  # per column: no pad
    sinks: list[Token] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    window: list[Token] = field(default_factory=list)
    chosen: list[list[Token]] = field(default_factory=list)  # of each head, where heads choose

    def copy(self) -> "Row":
        pages, chosen = [p.copy() for p in self.pages], [list(tokens) for tokens in self.chosen]
        return Row(list(self.real), list(self.sinks), pages, list(self.window), chosen)

    def wanted(self, sinks: int) -> list[int]:
        """Columns of the first real tokens."""
        return list(islice((column for column, real in enumerate(self.real) if real), sinks))

    def shown(self, sinks: int, head: int) -> list[Token]:
        """Real tokens, each once: a sink is read exactly, never from its page."""
        wanted = self.wanted(sinks)
        body = [t for page in self.pages for t in page.tokens if t.column not in wanted]
        body += self.chosen[head] if self.chosen else []
        return [t for t in (*self.sinks, *body, *self.window) if t.position >= 0]


class Oracle:
    """One layer of h heads and d channels. `ages` of pages, the youngest first; without any, tokens are dropped."""

    def __init__(
        self, window: int, sinks: int, page: int, h: int, d: int, ages: list[Age], shares: tuple[float, ...] = ()
    ) -> None:
        self.settings = (window, sinks, page, h, d, ages, shares)
        self.window, self.sinks, self.page, self.h, self.d, self.ages, self.shares = self.settings
        self.rows: list[Row] = []
        self.seen = 0

    def extend(self, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> None:
        """New tokens [b, h, s, d] join the window; a position of -1 is a pad."""
        if self.seen == 0:
            self.rows = [Row() for _ in positions]
        for row, k, v, p in zip(self.rows, keys, values, positions, strict=True):
            start = len(row.real)
            row.real += [bool(x >= 0) for x in p]
            row.window += [Token(start + i, int(p[i]), k[:, i], v[:, i]) for i in range(len(p))]
        self.seen += positions.shape[1]

    def spill(self) -> None:
        """Let whole pages leave."""
        for row in self.rows:
            n = len(row.real)
            start = n - len(row.window)
            stop = max(0, n - self.window) // self.page * self.page
            if stop <= start:
                continue
            wanted = row.wanted(self.sinks)
            out, row.window = row.window[: stop - start], row.window[stop - start :]
            row.sinks += [t for t in out if t.column in wanted]
            if self.shares:
                parts = [out[i : i + self.page] for i in range(0, len(out), self.page)]
                back = [t for part in parts for t in self._encode(part).tokens]  # scales are of a token alone
                fresh = [t for t in back if t.position >= 0 and t.column not in wanted]
                most = [math.ceil(share * stop / self.page) * self.page for share in self.shares]
                old = row.chosen or [[] for _ in self.shares]
                row.chosen = [(own + fresh)[:n] for own, n in zip(old, most, strict=True)]
                continue
            while out and self.ages:
                count = self.page - out[0].column % self.page
                row.pages.append(self._encode(out[:count]))
                out = out[count:]
                self._grow_old(row)

    def _encode(self, tokens: list[Token]) -> Page:
        """A page of these tokens, its other slots empty."""
        spare = self.page - len(tokens)
        keys, values = (np.stack(x, 1)[None] for x in ([t.key for t in tokens], [t.value for t in tokens]))
        keys, values = (np.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0))) for x in (keys, values))
        positions = np.array([[*(t.position for t in tokens), *[-1] * spare]], np.int32)
        looks = [age.lossy(keys, values, positions) for age in self.ages]
        return Page(
            [[Token(t.column, t.position, k[0][:, i], v[0][:, i]) for i, t in enumerate(tokens)] for k, v in looks]
        )

    def _grow_old(self, row: Row) -> None:
        for number, age in enumerate(self.ages):
            same = [page for page in row.pages if page.age == number]
            for page in same[: len(same) if age.pages is None else max(0, len(same) - age.pages)]:
                if age.pages is not None:
                    page.age, page.record = page.age + 1, Page([]).record
        row.pages = [page for page in row.pages if page.age < len(self.ages)]

    def crop(self, count: int) -> None:
        """Take the last `count` columns back; taking all of them back is starting anew."""
        self.seen -= count
        self.rows = self.rows if self.seen else []
        for row in self.rows:
            n = max(0, len(row.real) - count)
            del row.real[n:]
            row.sinks = [t for t in row.sinks if t.column < n]
            row.window = [t for t in row.window if t.column < n]
            row.pages = [cut for page in row.pages if (cut := page.cut(n)).tokens]

    def select(self, indices: list[int]) -> None:
        self.rows = [self.rows[i].copy() for i in indices]

    def copy(self) -> "Oracle":
        other = Oracle(*self.settings)
        other.rows, other.seen = [r.copy() for r in self.rows], self.seen
        return other

    def join(self, other: "Oracle") -> None:
        """The other one's rows below these."""
        self.rows = [r.copy() for r in (*self.rows, *other.rows)]
        self.seen = max(self.seen, other.seen)

    def alone(self, row: int) -> "Oracle":
        """One row in its own columns."""
        other = self.copy()
        other.rows = [self.rows[row].copy()]
        other.seen = len(other.rows[0].real)
        return other

    @property
    def took_sinks(self) -> bool:
        """Storage for sinks is taken with the first one of any row, and goes with the last."""
        return any(row.sinks for row in self.rows)

    @property
    def exact(self) -> int:
        """Tokens in the window of the row that has most."""
        return max((len(row.window) for row in self.rows), default=0)

    @property
    def pages(self) -> int:
        return max((len(row.pages) for row in self.rows), default=0)

    @property
    def recent(self) -> int:
        """Tokens in the longest window and the longest pages."""
        held = [
            [sum(len(p.tokens) for p in row.pages if p.age == n) for row in self.rows] for n in range(len(self.ages))
        ]
        return self.exact + sum(max(own, default=0) for own in held)

    @property
    def real(self) -> np.ndarray:
        """Which columns of the batch are tokens, [b, seen]."""
        return np.array([[False] * (self.seen - len(row.real)) + row.real for row in self.rows])

    def dense(self) -> Dense:
        """What is there, column by column; zero where nothing is shown."""
        keys = np.zeros((len(self.rows), self.h, self.seen, self.d), np.float32)
        values, shown = keys.copy(), np.zeros((len(self.rows), self.h, self.seen), bool)
        for i, row in enumerate(self.rows):
            for head in range(self.h):
                tokens, shift = row.shown(self.sinks, head), self.seen - len(row.real)
                columns = [t.column + shift for t in tokens]
                assert len(set(columns)) == len(columns), "the oracle itself shows a token twice"
                if tokens:
                    keys[i, head, columns] = np.stack([t.key[head] for t in tokens])
                    values[i, head, columns] = np.stack([t.value[head] for t in tokens])
                    shown[i, head, columns] = True
        return Dense(keys, values, shown)


def attention(query: np.ndarray, dense: Dense, scaling: float, softcap: float | None) -> np.ndarray:
    """Plain causal softmax attention in float64: the last s columns' queries [b, q, s, d] over the shown tokens."""
    s, seen, members = query.shape[2], dense.keys.shape[2], query.shape[1] // dense.keys.shape[1]
    keys, values = (x.repeat(members, 1).astype(float) for x in (dense.keys, dense.values))
    scores = query.astype(float) @ keys.swapaxes(-1, -2) * scaling
    if softcap is not None:
        scores = np.tanh(scores / softcap) * softcap
    visible = dense.shown.repeat(members, 1)[:, :, None, :] & (np.arange(seen) <= np.arange(seen - s, seen)[:, None])
    scores = np.where(visible, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * visible
    return weights @ values / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
