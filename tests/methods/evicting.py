"""Methods that choose tokens, against a brute force: every probability of every step, token by token, in float64."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import kvshrink
from kvshrink import Artifact, Full, data
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.errors import SettingError
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._roles import Fitted, Method
from kvshrink.methods._stats import LayerShape, Probe
from kvshrink.methods._token_probe import TokenProbe
from kvshrink.methods.evict.h2o import H2O
from kvshrink.store.tokens import TokenTable

SHAPE = LayerShape(2, 8, torch.float32)
MEMBERS = 2  # query heads of a KV head
WIDTH = 12  # of a layer's input
FREQUENCIES = 1e2 ** (-np.arange(4) / 4)


@dataclass
class Seen:
    """What one row of a step shows. Columns are all of the row's so far.

    row: its number. keys, values: as attention uses them, [2, columns, 8]; plain: keys before RoPE. first: column of
    the first exact token; own: columns of the new ones. asked: columns whose queries are asked. weights: their
    probabilities over all that a head holds, [4, asked, columns], 0 for a pad's query; shown: [2, asked, columns].
    queries: of those asked, before RoPE, [4, asked, 8]. hidden: the layer's input of the new tokens.
    """

    row: int
    keys: np.ndarray
    values: np.ndarray
    plain: np.ndarray
    real: np.ndarray
    positions: np.ndarray
    first: int
    own: np.ndarray
    asked: np.ndarray
    weights: np.ndarray
    shown: np.ndarray
    queries: np.ndarray
    hidden: np.ndarray

    @property
    def exact(self) -> slice:
        return slice(self.first, len(self.real))

    @property
    def mass(self) -> np.ndarray:
        """Attention that each column got, by KV head."""
        return self.weights.sum(1).reshape(2, MEMBERS, -1).sum(1)

    @property
    def mean(self) -> np.ndarray:
        """The same over how many of the queries see a column."""
        return self.mass / np.maximum(self.shown.sum(1), 1)


@dataclass(frozen=True)
class Rule:
    """What a method's text says: importance [2, columns] of what a step shows, and which of its new tokens are asked.

    keeps: what becomes of that from step to step. "step": it is taken when a token leaves the window; "sum": it adds
    up, what was there times `fade` for each new token; "latest": it replaces what was there; "own": it is taken when a
    token comes.
    """

    importance: Callable[[Seen], np.ndarray]
    asks: Callable[[int], Sequence[int]] | None = range
    keeps: str = "step"
    fade: float = 1.0


def pooled(observed: int = 32, pool: int = 7) -> Rule:
    """SnapKV's: the mean attention of the last queries, averaged over neighbours."""

    def importance(seen: Seen) -> np.ndarray:
        return smooth(seen, pool)

    return Rule(importance, lambda n: range(max(0, n - observed), n))


def smooth(seen: Seen, pool: int) -> np.ndarray:
    """Mean attention of `pool` neighbouring exact tokens. A pad is no neighbour, so that a row is as by itself."""
    found = seen.mean.copy()
    for c in range(seen.first, len(seen.real)):
        near = np.arange(max(seen.first, c - pool // 2), min(len(seen.real), c + pool // 2 + 1))
        near = near[seen.real[near]]
        found[:, c] = seen.mean[:, near].mean(1) if len(near) else 0.0
    return found


ADDED = Rule(lambda seen: seen.mass, keeps="sum")  # H2O's


def pages_of(pages: int, ratio: float, most: int | None = None, page: int = 32) -> int:
    """A share of pages, rounded up."""
    own = math.ceil(round(ratio * pages, 6))
    return own if most is None else min(own, max(1, most // page))


@dataclass
class Head:
    """One KV head of one row: what it keeps, by column, and the importance of each."""

    kept: dict[int, float] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)  # of the window's tokens, where they have one already
    joined: dict[int, np.ndarray] = field(default_factory=dict)  # values that those of dropped tokens joined


Counts = Callable[[int, list[dict[int, float]], int], Sequence[int]]  # row, candidates, pages gone -> tokens by head


def cache_of(method: Method, fitted: Sequence[Fitted], shape: LayerShape = SHAPE) -> KVCache:
    """A cache whose layers choose by what was fitted."""
    table = TokenTable()
    own = [method.at_layer(i, len(fitted)) for i in range(len(fitted))]
    layers = [
        CompressedLayer(m, shape, m.tiers(shape, f), table, policy=m.policy(shape, f))
        for m, f in zip(own, fitted, strict=True)
    ]
    return KVCache(layers, method, table, "model", "fitted")


class Steps:
    """A cache, and the same by brute force, fed with the same steps. The first row has `pads` left pads.

    rule: how tokens are ranked, None: as SnapKV or H2O do. counts: how many tokens each head holds; None: the share of
    the method's settings. whole: what stores the tokens that `method` chooses; None: `method` itself. turned: whether
    there is a RoPE. gap: columns of the first row, from one to before the other, that are pads too, as where a later
    turn is padded. moves: whether stored tokens may go; else they stay, and new ones share what is left.
    """

    def __init__(
        self,
        method: Evicting,
        rows: int = 2,
        pads: int = 0,
        rule: Rule | None = None,
        counts: Counts | None = None,
        fitted: Fitted | None = None,
        whole: Method | None = None,
        turned: bool = False,
        gap: tuple[int, int] = (0, 0),
        moves: bool = True,
    ) -> None:
        self.method, self.rows, self.pads, self.gap, self.turns = method, rows, pads, gap, turned
        self.rule = rule or (ADDED if isinstance(method, H2O) else pooled(*_observed(method)))
        self.asked_for, self.moves, self.demotes = counts, moves, getattr(whole, "demote", False)
        self.cache = cache_of(whole or method, [fitted or {}])
        self.lanes, self.page = self.cache.compressed[0].body.lanes, (whole or method).page
        self.exact = whole is None and method.bits is None
        self.keys = np.zeros((rows, 2, 0, 8))
        self.values, self.plain, self.attended = self.keys.copy(), self.keys.copy(), self.keys.copy()
        self.heads = [[Head() for _ in range(2)] for _ in range(rows)]
        self.streams = [np.random.default_rng(row) for row in range(rows)]
        self.junk = np.random.default_rng(99)

    def real(self, row: int) -> np.ndarray:
        """Which columns of a row are tokens: the first row has pads."""
        return self._real(row, np.arange(self.keys.shape[2]))

    def _real(self, row: int, columns: np.ndarray) -> np.ndarray:
        inside = (columns >= self.gap[0]) & (columns < self.gap[1])
        return ((columns >= self.pads) & ~inside) | (row > 0)

    def positions(self, row: int) -> np.ndarray:
        return np.maximum(0, self.real(row).cumsum() - 1)

    def sinks(self, row: int) -> list[int]:
        return [int(c) for c in np.nonzero(self.real(row))[0][: self.method.sinks]]

    def step(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(queries, keys and values that `update` returned)."""
        seen = self.keys.shape[2]
        k, v, q, hidden = (torch.from_numpy(x) for x in self._drawn(seen, tokens))
        self.plain, self.values = (
            np.concatenate([old, new.double().numpy()], 2) for old, new in ((self.plain, k), (self.values, v))
        )
        self.keys = np.concatenate([self.keys, np.zeros((self.rows, 2, tokens, 8))], 2)
        at = np.stack([self.positions(row)[seen:] for row in range(self.rows)])
        raw, rope = q.double().numpy(), None
        if self.turns:
            rope = Rope(torch.from_numpy(FREQUENCIES).float(), 1.0, False)
            k, q = (torch.from_numpy(turned(x.double().numpy(), at[:, None])).float() for x in (k, q))
        self.keys[:, :, seen:] = k.double().numpy()
        layer = self.cache.compressed[0]
        self.attended = self.keys if self.exact else self.read()[0]
        rows = layer.probes(tokens)
        probe = None if rows is None else ProbeQueries(rows, q[:, :, rows] * 8**-0.5, None)
        real = np.stack([self.real(row)[seen:] for row in range(self.rows)])
        given = None if real.all() and not self.pads and self.gap == (0, 0) else torch.from_numpy(real)
        self.cache.stage(0, torch.from_numpy(at).int(), given, rope, True, "model", probe, hidden=hidden)
        out = self.cache.update(k.clone(), v.clone(), 0)
        if self.rule.asks is not None and rows is not None:
            assert set(rows.tolist()) <= set(self.rule.asks(tokens)), "queries that the method does not name"
        self._choose(raw, q.double().numpy(), hidden.double().numpy(), seen)
        return (q, *out)

    def _drawn(self, seen: int, tokens: int) -> list[np.ndarray]:
        """Keys, values, queries and inputs of new columns, float32. A row's n-th token is the same whatever chunks it
        comes in, and whatever pads stand before it."""
        found = np.zeros((self.rows, tokens, 2 * 8 + 2 + 2 * 8 + 2 * MEMBERS * 8 + WIDTH), np.float32)
        for row in range(self.rows):
            real = self._real(row, np.arange(seen, seen + tokens))
            found[row, real] = self.streams[row].standard_normal((int(real.sum()), found.shape[2]))
            found[row, ~real] = self.junk.standard_normal((int((~real).sum()), found.shape[2]))
        k, size, v, q, hidden = np.split(found, np.cumsum([16, 2, 16, MEMBERS * 16]), 2)
        k, v, q = (x.reshape(self.rows, tokens, -1, 8).swapaxes(1, 2) for x in (k, v, q))
        return [k * np.exp(0.5 + 0.4 * size.swapaxes(1, 2)[..., None]), v, q, hidden]

    def left(self, length: int) -> int:
        return max(0, length - self.method.window) // self.page * self.page

    def stored(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """(columns of all slots, -1 at none, [rows, 2, slots]; keys and values that they come back as)."""
        layer = self.cache.compressed[0]
        pages = layer.body.youngest
        rows = [c.decode(pages.records().under(f"{s}."), 2).numpy() for s, c in zip("kv", layer.codecs, strict=True)]
        return pages.slots.repeat_interleave(2 // self.lanes, 1).numpy(), rows

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of all columns as attention sees them: those in pages as they come back."""
        found = self.keys.copy(), self.values.copy()
        for age in reversed(self.cache.compressed[0].body.ages):  # what is chosen is read where it is chosen
            if not len(age.pages):
                continue
            records, slots = age.pages.records(), age.pages.slots.numpy()
            slots = np.repeat(slots, 2 // slots.shape[1], 1)
            row, head, at = np.nonzero(slots >= 0)
            for own, name, codec in zip(found, "kv", age.tier.codecs, strict=True):
                rows = codec.decode(records.under(f"{name}."), 2).numpy()
                own[row, head, slots[row, head, at]] = rows[row, head, at]
        for own, plain in zip(found, (self.keys, self.values), strict=True):
            for row in range(self.rows):
                own[row][:, self.sinks(row)] = plain[row][:, self.sinks(row)]
        return found

    def _choose(self, raw: np.ndarray, queries: np.ndarray, hidden: np.ndarray, seen: int) -> None:
        length, rule = self.keys.shape[2], self.rule
        first, last = self.left(seen), self.left(length)
        if rule.keeps in ("step", "latest") and last == first:
            return
        for row, heads in enumerate(self.heads):
            found = rule.importance(self._seen(row, raw, queries, hidden, seen, first))
            if self.lanes == 1:
                found = np.broadcast_to(found.mean(0), found.shape)
            fade = rule.fade ** (length - seen)
            for head, own in zip(heads, found, strict=True):
                if rule.keeps == "sum":
                    head.kept = {c: x * fade + own[c] for c, x in head.kept.items()}
                    before = {c: x * fade for c, x in head.scores.items()}
                    head.scores = {c: before.get(c, 0.0) + own[c] for c in range(first, length)}
                elif rule.keeps == "own":
                    head.scores |= {c: own[c] for c in range(seen, length)}
                else:
                    head.scores = {c: own[c] for c in range(first, length)}
                    if rule.keeps == "latest":
                        head.kept = {c: own[c] for c in head.kept}
            if last > first:
                self._leave(row, first, last, length - seen)

    def _leave(self, row: int, first: int, last: int, new: int) -> None:
        """The page that leaves, and those that make room."""
        method, heads, real, sinks = self.method, self.heads[row], self.real(row), self.sinks(row)
        begin = int(np.argmax(real))
        for head in heads:
            there = [c for c in range(first, last) if real[c] and c not in sinks]
            head.kept |= {c: head.scores[c] for c in there}
            head.kept |= {c: math.inf for c in head.kept if c < begin + method.protect}
            head.scores = {c: x for c, x in head.scores.items() if c >= last}
        if new == 1 and method.schedule == "prompt":
            for head in heads if self.demotes else ():  # what is decoded is held anyway
                head.kept = {c: x for c, x in head.kept.items() if c < first}
            return
        worth = [{c: x if self.moves or c >= first else math.inf for c, x in head.kept.items()} for head in heads]
        most = (self.asked_for or self.counts)(row, worth, last // self.page)
        for n, (head, own, count) in enumerate(zip(heads, worth, most, strict=True)):
            always = -(-sum(x == math.inf for x in own.values()) // self.page) * self.page
            count = max(count, always)
            if isinstance(method.schedule, int) and new == 1 and len(own) <= count + method.schedule:
                continue
            order = sorted(own, key=lambda c, own=own: (-own[c], c))
            gone = [c for c in order[count:] if c >= first]
            head.kept = {c: head.kept[c] for c in sorted(order[:count])}
            if method.merge:
                self._join(row, n, [c for c in head.kept if c >= first], gone)

    def _join(self, row: int, head: int, kept: list[int], gone: list[int]) -> None:
        """Values of tokens that leave and are dropped join those of the nearest keys that leave and stay."""
        parts = {c: [self.values[row, head, c]] for c in kept}
        for c in gone if kept else ():
            key = self.keys[row, head, c]
            cosines = [self.keys[row, head, k] @ key / np.linalg.norm(self.keys[row, head, k]) for k in kept]
            parts[kept[int(np.argmax(cosines))]].append(self.values[row, head, c])
        self.heads[row][head].joined |= {c: np.mean(own, 0) for c, own in parts.items() if len(own) > 1}

    def counts(self, row: int, candidates: list[dict[int, float]], pages: int) -> list[int]:
        """Tokens of each head, by the settings."""
        method, page = self.method, self.page
        if method.floor is None:
            return [pages_of(pages, method.ratio, method.most, page) * page] * 2
        table = np.full((2, pages * page), -np.inf)
        for n, own in enumerate(candidates):
            table[n, list(own)] = list(own.values())
        return [int(n) * page for n in wanted(table, method.ratio, method.floor, page, method.most)]

    def _seen(self, row: int, raw, queries, hidden, seen: int, first: int) -> Seen:
        length, real, sinks = self.keys.shape[2], self.real(row), self.sinks(row)
        own = np.arange(seen, length)
        asked = own[list(self.rule.asks(length - seen))] if self.rule.asks is not None else own[:0]
        shown = np.zeros((2, len(asked), length), bool)
        for n, head in enumerate(self.heads[row]):
            held = np.zeros(length, bool)
            held[first if not self.demotes else 0 :] = True
            held[[*head.kept, *(c for c in sinks if c < first)]] = True
            shown[n] = held & real & (np.arange(length) <= asked[:, None]) & real[asked, None]
        used = queries[row][:, asked - seen]
        scores = np.einsum("hmxd,htd->hmxt", used.reshape(2, MEMBERS, len(asked), 8), self.attended[row])
        scores = scores * 8**-0.5
        weights = np.where(shown[:, None], np.exp(scores - scores.max(-1, keepdims=True, initial=-1e9)), 0.0)
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        return Seen(
            row,
            self.keys[row],
            self.values[row],
            self.plain[row],
            real,
            self.positions(row),
            first,
            own,
            asked,
            weights.reshape(2 * MEMBERS, len(asked), length),
            shown,
            raw[row][:, asked - seen],
            hidden[row],
        )

    def kept(self) -> list[list[list[int]]]:
        """Columns that the cache holds in its pages, by row and head."""
        pages = self.cache.compressed[0].body.youngest
        if not len(pages):
            return [[[] for _ in range(2)] for _ in range(self.rows)]
        slots = pages.slots.repeat_interleave(2 // self.lanes, 1)
        return [[[c for c in own if c >= 0] for own in row] for row in slots.tolist()]

    def check(self) -> None:
        """The cache holds the tokens of the brute force, knows what each is worth, and has its key and value."""
        assert self.kept() == [[sorted(head.kept) for head in heads] for heads in self.heads]
        if not len(pages := self.cache.compressed[0].body.youngest):
            return
        slots, stored = self.stored()
        known = pages.importance.repeat_interleave(2 // self.lanes, 1).numpy()
        for row, head in np.ndindex(self.rows, 2):
            own, at = self.heads[row][head], np.nonzero(slots[row, head] >= 0)[0]
            columns = slots[row, head, at]
            importance = np.array([own.kept[c] for c in columns])
            np.testing.assert_allclose(known[row, head, at], importance, rtol=2e-3, atol=1e-5)
            if self.exact:
                values = [own.joined.get(c, self.values[row, head, c]) for c in columns]
                assert np.array_equal(stored[0][row, head, at], self.keys[row, head, columns])
                assert np.abs(stored[1][row, head, at] - np.reshape(values, (-1, 8))).max(initial=0) < 1e-6

    def run(self, *steps: int) -> "Steps":
        """Some steps, with a check after each."""
        for tokens in steps:
            self.step(tokens)
            self.check()
        return self

    def dense(self, row: int, head: int) -> list[int]:
        """All columns that attention reads."""
        real = self.real(row)
        length = self.keys.shape[2]
        exact = [c for c in range(self.left(length), length) if real[c]]
        own = np.nonzero(real)[0].tolist() if self.demotes else self.heads[row][head].kept
        return sorted({*own, *self.sinks(row), *exact})


def turned(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows [..., t, 8] after RoPE at these positions [..., t], halves together."""
    as_complex = rows[..., :4] + 1j * rows[..., 4:]
    found = as_complex * np.exp(1j * positions[..., None] * FREQUENCIES)
    return np.concatenate([found.real, found.imag], -1)


def _observed(method: Evicting) -> tuple[int, int]:
    return getattr(method, "observed", 32), getattr(method, "pool", 7)


def wanted(importance: np.ndarray, ratio: float, floor: float, page: int, most: int | None = None) -> np.ndarray:
    """Pages of each head, by the rule as written: who wins among all heads, a floor, whole pages."""
    lanes, tokens = importance.shape
    even = pages_of(tokens // page, ratio, most, page) * page
    order = sorted(((-x, h, t) for (h, t), x in np.ndenumerate(importance) if x > -np.inf))[: lanes * even]
    won = np.bincount([h for _, h, _ in order], minlength=lanes)
    share = (floor * even + (1 - floor) * won * lanes * even / max(1, won.sum())) / page
    whole = np.floor(share)
    for head in sorted(range(lanes), key=lambda h: (-(share - whole)[h], h))[: int(lanes * even // page - whole.sum())]:
        whole[head] += 1
    return whole


def refused(kind: type[Method], *settings: dict) -> None:
    """Each of these settings is, in one line."""
    for own in settings:
        with pytest.raises(SettingError, match=r"\A[^\n]+\Z"):
            kind(**own)


def beside_pads(method: Evicting, rule: Rule, pads: int = 64) -> list[np.ndarray]:
    """Importance of the same tokens without pads and behind whole pages of them, [2, tokens] each. The method keeps
    all."""
    found = []
    for count in (0, pads):
        steps = Steps(method, rows=1, pads=count, rule=rule, counts=lambda row, candidates, pages: [pages * 32] * 2)
        steps.step(count + 200)
        pages = steps.cache.compressed[0].body.youngest
        there = pages.columns[0, 0] >= 0
        assert (pages.columns[0, 0, there] - count).tolist() == list(range(method.sinks, 160))
        found.append(pages.importance[0, :, there].numpy())
    return found


NEWEST_FIRST = Rule(lambda seen: np.broadcast_to(seen.positions.astype(float), (2, len(seen.real))), None, keeps="own")


PADS = 32  # a whole page, so that the pages of a padded row lie as without pads


@functools.cache
def reference() -> tuple[Any, Any, torch.Tensor]:
    """The bundled model, its tokenizer and two prompts [2, 600], of which the second one begins with pads. Their ends
    come from far back."""
    model, tokenizer = kvshrink.reference_model("float32")
    words = data.path("heldout.txt").read_text(encoding="utf-8")[5000:9000]
    ids = tokenizer(words, return_tensors="pt")["input_ids"][0]
    first = torch.cat([ids[:500], ids[50:150]])
    second = torch.cat([torch.full((PADS,), 2), ids[PADS:500], ids[200:300]])
    return model, tokenizer, torch.stack([first, second])


def fitted_to_reference(method: Method) -> Artifact:
    model, tokenizer, _ = reference()
    text = data.path("calibration.txt").read_text(encoding="utf-8")[:4000]
    return kvshrink.fit(model, method, text, tokenizer=tokenizer, length=512, progress=False)


def generated(method: Any, rows: torch.Tensor, pads: int = 0) -> tuple[list[list[int]], int]:
    """(8 greedy tokens behind each prompt, bytes of the cache). pads: at the left of the last row."""
    mask = torch.ones_like(rows)
    mask[-1, :pads] = 0
    cache = kvshrink.make_cache(reference()[0], method)
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    out = reference()[0].generate(rows, attention_mask=mask, past_key_values=cache, **given)
    return out[:, rows.shape[1] :].tolist(), cache.nbytes


def check_generate(method: Any, share: float) -> None:
    """Bytes fall to this share of a full cache, and a padded batch says what its rows say by themselves: the share of
    tokens must be as many whole pages with a page of pads as without."""
    rows = reference()[2]
    both, held = generated(method, rows, PADS)
    assert both == generated(method, rows[:1])[0] + generated(method, rows[1:, PADS:])[0]
    assert held < share * generated(Full(), rows, PADS)[1]


def probe_of(**answers: Any) -> Any:
    """A probe whose model gives these answers about its tokens and heads."""
    tokens = MagicMock(spec=TokenProbe, **{f"{name}.return_value": found for name, found in answers.items()})
    return MagicMock(spec=Probe, tokens=tokens)
