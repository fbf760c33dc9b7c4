"""Methods that choose tokens by head, against a brute force: every probability of every step, token by token."""

from dataclasses import dataclass, field

import numpy as np
import torch

from kvshrink.cache.cache import KVCache
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._stats import LayerShape
from tests.cache.build import make

SHAPE = LayerShape(2, 8, torch.float32)
MEMBERS = 2  # query heads of a KV head


@dataclass
class Head:
    """One KV head of one row: what it keeps, by column, and the importance of each."""

    kept: dict[int, float] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)  # of the window's tokens, where they add up


class Steps:
    """A cache, and the same by brute force, fed with the same steps."""

    def __init__(self, method: Evicting, rows: int = 2, pads: int = 0) -> None:
        self.method, self.rows, self.pads = method, rows, pads
        self.cache: KVCache = make(method, SHAPE, [{}])
        self.keys = np.zeros((rows, 2, 0, 8))
        self.values = self.keys.copy()
        self.heads = [[Head() for _ in range(2)] for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(0)

    def real(self, row: int) -> np.ndarray:
        """Which columns of a row are tokens: the first row has left pads."""
        return np.arange(self.keys.shape[2]) >= (self.pads if row == 0 else 0)

    def step(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(queries, keys and values that `update` returned)."""
        k, v = torch.randn(2, self.rows, 2, tokens, 8, generator=self.generator)
        k = k * torch.exp(2 * torch.rand(self.rows, 2, tokens, 1, generator=self.generator))
        q = torch.randn(self.rows, 2 * MEMBERS, tokens, 8, generator=self.generator)
        seen = self.keys.shape[2]
        self.keys, self.values = (
            np.concatenate([old, new.double().numpy()], 2) for old, new in ((self.keys, k), (self.values, v))
        )
        layer = self.cache.compressed[0]
        rows = layer.probes(tokens)
        probe = None if rows is None else ProbeQueries(rows, q[:, :, rows] * 8**-0.5, None)
        real = np.stack([self.real(row)[seen:] for row in range(self.rows)])
        given = None if real.all() and not self.pads else torch.from_numpy(real)
        positions = torch.arange(seen, seen + tokens, dtype=torch.int32).expand(self.rows, -1)
        self.cache.stage(0, positions, given, None, True, "model", probe)
        out = self.cache.update(k.clone(), v.clone(), 0)
        if rows is not None:
            self._choose(q.double().numpy() * 8**-0.5, seen, rows.tolist())
        return (q, *out)

    def left(self, length: int) -> int:
        return max(0, length - self.method.window) // 32 * 32

    def _choose(self, queries: np.ndarray, seen: int, asked: list[int]) -> None:
        length, page = self.keys.shape[2], self.method.page
        first, last = self.left(seen), self.left(length)
        for row, heads in enumerate(self.heads):
            real = self.real(row)
            sinks = list(np.nonzero(real)[0][: self.method.sinks])
            known = [self._mass(queries[row], row, n, first, asked, real, sinks) for n in range(2)]
            scorer = self.method.scorer({})
            for head, (mass, count) in zip(heads, known, strict=True):
                window = np.arange(first, length)
                new = self._importance(scorer, mass[window], count[window])
                if scorer.remembers:
                    for c in head.kept:
                        head.kept[c] += mass[c]
                    new = new + np.array([head.scores.get(c, 0.0) for c in window])
                    head.scores = dict(zip(window.tolist(), new, strict=True))
                if last > first:
                    leaving = {int(c): x for c, x in zip(window, new, strict=True) if c < last}
                    head.kept |= {c: x for c, x in leaving.items() if real[c] and c not in sinks}
                    head.scores = {c: x for c, x in head.scores.items() if c >= last}
            if last > first:
                for head, most in zip(heads, self.counts(row, last // page), strict=True):
                    order = sorted(head.kept, key=lambda c, h=head: (-h.kept[c], c))
                    head.kept = {c: head.kept[c] for c in sorted(order[:most])}

    def counts(self, row: int, pages: int) -> list[int]:
        """Tokens of each head."""
        budget = self.method.budget(self.method.ratio, {})
        if not hasattr(budget, "floor"):
            return [budget.of(pages) * 32] * 2
        table = np.full((2, pages * 32), -np.inf)
        for n, head in enumerate(self.heads[row]):
            table[n, list(head.kept)] = list(head.kept.values())
        return [int(n) * 32 for n in wanted(table, budget.ratio, budget.floor, 32)]

    def _importance(self, scorer, mass: np.ndarray, count: np.ndarray) -> np.ndarray:
        if scorer.remembers:
            return mass
        plain, side = mass / np.maximum(count, 1), scorer.pool // 2
        return np.array([plain[max(0, i - side) : i + side + 1].mean() for i in range(len(plain))])

    def _mass(self, queries, row: int, head: int, first: int, asked, real, sinks) -> tuple[np.ndarray, np.ndarray]:
        """Attention that every column got from the queries asked, and by how many of them it was seen."""
        length = self.keys.shape[2]
        held = np.zeros(length, bool)
        held[first:] = True
        held[[*self.heads[row][head].kept, *(c for c in sinks if c < first)]] = True
        mass, count = np.zeros(length), np.zeros(length)
        for i in asked:
            own = length - queries.shape[1] + i
            shown = held & real & (np.arange(length) <= own)
            if not real[own]:
                continue
            count += shown
            for member in range(MEMBERS):
                scores = self.keys[row, head] @ queries[head * MEMBERS + member, i]
                weights = np.where(shown, np.exp(scores - scores[shown].max()), 0.0)
                mass += weights / weights.sum()
        return mass, count

    def kept(self) -> list[list[list[int]]]:
        """Columns that the cache holds in its pages, by row and head."""
        pages = self.cache.compressed[0].body.youngest
        found = [[[] for _ in range(2)] for _ in range(self.rows)]
        for row in range(self.rows if len(pages) else 0):
            for head in range(2):
                found[row][head] = [int(c) for c in pages.slots[row, head] if c >= 0]
        return found

    def check(self) -> None:
        assert self.kept() == [[sorted(head.kept) for head in heads] for heads in self.heads]

    def dense(self, row: int, head: int) -> list[int]:
        """All columns that attention reads."""
        real = self.real(row)
        sinks = np.nonzero(real)[0][: self.method.sinks]
        length = self.keys.shape[2]
        exact = [c for c in range(self.left(length), length) if real[c]]
        return sorted({*self.heads[row][head].kept, *(int(c) for c in sinks), *exact})


def wanted(importance: np.ndarray, ratio: float, floor: float, page: int) -> np.ndarray:
    """Pages of each head, by the rule as written: who wins among all heads, a floor, whole pages."""
    lanes, tokens = importance.shape
    even = -(-round(tokens // page * ratio * 2**20) // 2**20) * page
    order = sorted(((-x, h, t) for (h, t), x in np.ndenumerate(importance) if x > -np.inf))[: lanes * even]
    won = np.bincount([h for _, h, _ in order], minlength=lanes)
    share = (floor * even + (1 - floor) * won * lanes * even / max(1, won.sum())) / page
    whole = np.floor(share)
    for head in sorted(range(lanes), key=lambda h: (-(share - whole)[h], h))[: int(lanes * even // page - whole.sum())]:
        whole[head] += 1
    return whole
