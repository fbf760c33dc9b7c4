"""Drives a two-layer cache and two oracles through the same operations and compares what attention would be shown."""

import copy
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshrink.cache import attend as attend_module
from kvshrink.cache.cache import KVCache
from kvshrink.cache.rope import Rope
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.cache.snapshot import Snapshot
from kvshrink.errors import CacheError
from kvshrink.methods._roles import Method, Tier
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.rope_commuting import RopeCommuting
from kvshrink.methods.lowrank.sals import SALS
from kvshrink.methods.quant.accllm import AccLLM
from kvshrink.methods.quant.rtn import RTN
from kvshrink.methods.quant.saq import SAQ
from kvshrink.methods.quant.xquant import XQuant
from kvshrink.store.growth import slots_for
from tests.cache.build import assemble, bases, weights
from tests.cache.operations import Copy, Crop, Join, Op, Reload, Reorder, Repeat, Reset, Select, Setup, Split, Update
from tests.cache.oracle import Age, Dense, Lossy, Oracle, attention
from tests.cache.ragged import SHARES, FirstOfEachHead

HEADS, DIM, QUERIES, LAYERS = 2, 8, 4, 2
SHAPE = LayerShape(HEADS, DIM, torch.float32)
TOLERANCE = 1e-4
CHUNK = 256  # columns that the token table takes at a time
ROPES = [
    Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), 1.0, False),
    Rope(torch.tensor([1.0, 0.2]), 1.3, True),  # YaRN's scaling on half of the channels
    None,
]
METHODS = {
    "cskv_lossless": (CSKV(keep=1.0), 16),
    "cskv_int4": (CSKV(keep=0.5, bits=4), 8),
    "rtn_raw": (RTN(bits=None), 0),
    "rtn_int4": (RTN(bits=4), 0),
    "commuting_lossless": (RopeCommuting(keep=1.0), 16),
    "commuting_int4": (RopeCommuting(keep=0.5, bits=4), 8),
    "sals_all": (SALS(keep=1.0, topk=1.0), 16),  # a single token picks every token, one by one
    "sals_all_int4": (SALS(keep=0.5, bits=4, topk=1.0), 8),
    "rtn_int4_window_8": (RTN(bits=4, window_bits=8), 0),
    "saq": (SAQ(ages=(16, 24)), 0),  # two pages, then three
    "accllm": (AccLLM(recent=40), 0),
    "xquant_input": (XQuant(), 0),  # one stored thing for keys and values
    "streaming_llm": (StreamingLLM(), 0),
    "ragged_heads": (FirstOfEachHead(), 0),
    "ragged_heads_int8": (FirstOfEachHead(bits=8), 0),
}


class Machine:
    """One sequence of operations."""

    def __init__(self, name: str, setup: Setup, tally: Counter, folder: Path) -> None:
        base = METHODS[name][0]
        heads = {"group_heads": HEADS // setup.groups} if isinstance(base, CSKV) else {}
        self.method: Method = type(base)(**base.settings() | {"window": setup.window, "sinks": setup.sinks} | heads)
        self.tiers = _tiers(name, self.method, setup.groups)
        self.setup, self.rope, self.tally, self.folder = setup, ROPES[setup.rope], tally, folder
        attend_module.BLOCK_ELEMENTS = setup.block * SHAPE.width
        attend_module.SCORE_ELEMENTS = 120 * QUERIES * setup.block
        self.cache, self.oracles = self.new_cache(), self.new_oracles()
        self.columns = 0  # that the token table has room for
        self.rows = setup.rows
        self.steps, self.compared = 0, False
        self.left: list[tuple[KVCache, list[Oracle]]] = []  # caches that were copied: they must stay as they were

    def new_cache(self) -> KVCache:
        return assemble(self.method, SHAPE, self.tiers)

    def new_oracles(self) -> list[Oracle]:
        rules = (self.setup.window, self.setup.sinks, self.method.page, HEADS, DIM)
        shares = SHARES if isinstance(self.method, FirstOfEachHead) else ()
        return [Oracle(*rules, _ages(self.method, ladder, self.rope), shares) for ladder in self.tiers]

    @property
    def seen(self) -> int:
        return self.oracles[0].seen

    def apply(self, op: Op) -> None:
        self.steps += 1
        self.tally[type(op).__name__.lower()] += 1
        getattr(self, "_" + type(op).__name__.lower())(op)
        self.compared = not isinstance(op, Update)  # an update compares what it returns, not what it leaves
        if self.compared:
            self.probe(self.cache, self.oracles, self.steps % 2)

    def finish(self) -> None:
        """What the last update left, and every cache that was left behind."""
        if not self.compared:
            self.probe(self.cache, self.oracles, self.steps % 2)
        self.check_bytes()
        for left in self.left:
            self.probe(*left, 0)

    # --- operations ---

    def _update(self, op: Update) -> None:
        b, s = self.rows, op.tokens
        before = [row.real for row in self.oracles[0].rows] if self.seen else [[] for _ in range(b)]
        real = np.arange(s) >= np.minimum([*op.pads, 0, *op.pads][:b], s - 1)[:, None]
        if op.holes:
            real &= np.random.default_rng(self.steps).random((b, s)) > 0.3
            real[:, -1] = True
        count = np.array([sum(row) for row in before])[:, None] + real.cumsum(1)
        positions = np.where(real, self.setup.offset + count - 1, -1).astype(np.int32)
        staged = torch.from_numpy(np.where(real, positions, 1).astype(np.int32))  # what models are given at pads
        given = torch.from_numpy(real) if op.masked or not real.all() else None
        loud = torch.where(torch.from_numpy(real), 1.0, 1000.0)  # a pad that entered a minimum or a sum would show
        g = torch.Generator().manual_seed(self.steps)
        for i, oracle in enumerate(self.oracles):
            k, v = torch.randn(2, b, HEADS, s, DIM, generator=g) * loud[:, None, :, None]
            if self.method.window_bits == 8:  # numbers that 8 bits hold exactly, so that the same rules are true
                form = self.method.window_form(SHAPE)
                k, v = (form.rows(form.stored(x)) for x in (k, v))
            own = self.method.drops_tokens or op.own == i
            asked = self.cache.layers[i].probes(s)
            probe = None if asked is None else ProbeQueries(asked, torch.zeros(b, QUERIES, len(asked), DIM), None)
            self.cache.stage(i, staged, given, self.rope, own, "model", probe)
            keys, values = self.cache.update(k.clone(), v.clone(), i)
            oracle.extend(k.numpy(), v.numpy(), positions)
            snapshot = getattr(keys, "_kvshrink", None)
            left = oracle.exact < oracle.seen or any(len(row.window) < len(row.real) for row in oracle.rows)
            assert (snapshot is not None) == (own and left)
            if snapshot is None:
                _compare(keys, values, oracle.dense())
            else:
                self.compare_attention(keys, values, snapshot, oracle, s, op.masked, op.additive)
            pages = oracle.pages
            oracle.spill()
            self.tally["pages"] += oracle.pages - pages
        if self.seen > self.columns:
            self.columns = slots_for(self.seen, CHUNK)

    def _crop(self, op: Crop) -> None:
        count, held = min(op.tokens, self.seen), self.oracles[0].exact
        recent = held if self.oracles[0].shares else self.oracles[0].recent
        count = self.seen - count if op.by_length else count
        argument = op.tokens if op.by_length else -count
        if self.method.drops_tokens and recent < count < self.seen:
            with pytest.raises(CacheError, match=f"cannot crop {count} tokens"):
                self.cache.crop(argument)
            self.tally["crop refused"] += 1
            return
        self.cache.crop(argument)
        self.tally["crop into the body"] += held < count < self.seen
        for oracle in self.oracles:
            oracle.crop(count)
        if self.seen == 0:  # as good as new: the next batch may be of any size
            self.columns, self.rows = 0, self.setup.rows

    def _reorder(self, op: Reorder) -> None:
        rows = [op.rows[i % len(op.rows)] % self.rows for i in range(self.rows)]
        self.cache.reorder_cache(torch.tensor(rows))
        self._rows(rows)

    def _select(self, op: Select) -> None:
        rows = [i % self.rows for i in op.rows]
        self.cache.batch_select_indices(torch.tensor(rows))
        self._rows(rows)

    def _repeat(self, op: Repeat) -> None:
        if self.rows <= 2:
            self.cache.batch_repeat_interleave(2)
            self._rows([i for i in range(self.rows) for _ in range(2)])

    def _rows(self, rows: list[int]) -> None:
        for oracle in self.oracles:
            if oracle.rows:
                oracle.select(rows)
        if self.columns:  # an empty cache has no rows yet
            self.rows = len(rows)

    def _copy(self, op: Copy) -> None:
        self.left.append((self.cache, [o.copy() for o in self.oracles]))
        self.cache = copy.deepcopy(self.cache)
        assert all(layer.table is self.cache.table for layer in self.cache.compressed)

    def _reload(self, op: Reload) -> None:
        other = self.new_cache()
        if op.into_used:
            other = copy.deepcopy(self.cache)
            other.crop(-min(3, other.get_seq_length()) if not self.method.drops_tokens else 0)
        if op.file:
            self.cache.save(self.folder / "cache.safetensors")
            self.cache = other.load(self.folder / "cache.safetensors")
        else:
            self.cache = other.load_state_dict(self.cache.state_dict())
        self.columns = slots_for(self.seen, CHUNK)

    def _reset(self, op: Reset) -> None:
        self.cache.reset()
        self.oracles, self.columns, self.rows = self.new_oracles(), 0, self.setup.rows

    def _join(self, op: Join) -> None:
        if not self.seen or self.rows + op.rows > 5:
            return
        other = copy.copy(self)
        other.cache, other.oracles, other.rows, other.columns = self.new_cache(), self.new_oracles(), op.rows, 0
        other._update(Update(op.tokens, op.pads))
        pair = [other, self] if op.before else [self, other]
        for one in pair:
            self.left.append((one.cache, [o.copy() for o in one.oracles]))
        self.cache = KVCache.join([one.cache for one in pair])
        for first, second in zip(pair[0].oracles, pair[1].oracles, strict=True):
            first.join(second)
        self.oracles, self.rows = pair[0].oracles, self.rows + op.rows
        self.columns = slots_for(self.seen, CHUNK)

    def _split(self, op: Split) -> None:
        rows = [i % self.rows for i in op.rows]
        if not self.seen or not self.oracles[0].rows[rows[0]].real:  # of that row a crop has left nothing
            return
        self.left.append((self.cache, [o.copy() for o in self.oracles]))
        alone = self.cache.split()
        assert len(alone) == self.rows
        parts = [[oracle.alone(i) for oracle in self.oracles] for i in rows]
        self.left += [(alone[i], [o.copy() for o in part]) for i, part in zip(rows[1:], parts[1:], strict=True)]
        if any(not part[0].seen for part in parts):  # a row of which a crop has left nothing joins none
            rows, parts = rows[:1], parts[:1]
        self.cache = alone[rows[0]] if len(rows) == 1 else KVCache.join([alone[i] for i in rows])
        self.oracles, self.rows = parts[0], len(rows)
        for part in parts[1:]:
            for oracle, more in zip(self.oracles, part, strict=True):
                oracle.join(more)
        self.columns = slots_for(self.seen, CHUNK)

    # --- comparisons ---

    def probe(self, cache: KVCache, oracles: list[Oracle], rebuilt: int) -> None:
        """Without adding a token: one layer is materialised, the other one read by attention."""
        assert cache.get_seq_length() == oracles[0].seen
        assert cache.get_mask_sizes(5, 0) == (oracles[0].seen + 5, 0)
        if oracles[0].seen == 0:
            return
        for i, (layer, oracle) in enumerate(zip(cache.compressed, oracles, strict=True)):
            keys, values = layer.window.view()
            assert keys.shape[2] == oracle.exact
            snapshot = layer.snapshot(self.rope)
            if i == rebuilt:
                _compare(*attend_module.rebuild(snapshot, keys, values), oracle.dense())
            else:
                self.compare_attention(keys, values, snapshot, oracle, min(2, oracle.seen), False, False)

    def compare_attention(
        self, keys, values, snapshot: Snapshot, oracle: Oracle, s: int, masked: bool, additive: bool
    ) -> None:
        dense = oracle.dense()
        b, _, seen = dense.shown.shape
        query = torch.randn(b, QUERIES, s, DIM, generator=torch.Generator().manual_seed(seen))
        real = oracle.real
        mask = None
        if masked or not real[:, snapshot.first :].all():  # pads that have left the window are known to the cache
            causal = np.arange(seen) <= np.arange(seen - s, seen)[:, None]
            mask = torch.from_numpy(real[:, None, None] & causal)
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
        softcap = self.setup.softcap
        out = attend_module.attend(query, keys, values, mask, DIM**-0.5, softcap, snapshot)
        assert out.isfinite().all(), "attention is NaN or infinite somewhere, pads included"
        wanted = attention(query.numpy(), dense, DIM**-0.5, softcap)
        asked = real[:, seen - s :]  # what a pad itself attends to is nobody's business
        _close(out.numpy().swapaxes(1, 2)[asked], wanted.swapaxes(1, 2)[asked], "attention output")

    def check_bytes(self) -> None:
        """Each record is held once, and, where no other cache may read it, no longer than it is read."""
        oracle, cache = self.oracles[0], self.cache
        pages = {page.record: page.age for row in oracle.rows for page in row.pages}
        wanted = sum(codec.page_bytes() for age in pages.values() for codec in self.tiers[0][age].codecs or ())
        for layer in cache.compressed:
            if layer.body.chooses:
                continue
            held = layer.held()
            stored = held.payload + held.metadata
            assert stored == wanted or (self.left and stored > wanted)
            assert held.window <= 2 * self.rows * layer.window.capacity * SHAPE.token_bytes
            assert held.sinks == oracle.took_sinks * self.rows * self.setup.sinks * (SHAPE.token_bytes + 4)
        assert cache.report().table_bytes == 4 * self.rows * self.columns


def _tiers(name: str, method: Method, groups: int) -> list[tuple[Tier, ...]]:
    """Tiers of each layer; codecs are made once."""
    fitted = _fitted(name, groups)
    return [method.tiers(SHAPE, f) for f in fitted]


@cache
def _fitted(name: str, groups: int) -> list[dict]:
    """Tensors of each layer."""
    method, rank = METHODS[name]
    mean = 0.0 if isinstance(method, RopeCommuting) else 0.5  # keys after RoPE are not centred
    groups = groups if isinstance(method, CSKV) else 1
    if isinstance(method, XQuant):
        return [weights(SHAPE, seed=i) for i in range(LAYERS)]
    return [bases(SHAPE, rank // groups, rank, groups, mean, seed=i) if rank else {} for i in range(LAYERS)]


def _ages(method: Method, tiers: tuple[Tier, ...], rope: Rope | None) -> list[Age]:
    """Each tier as what a page would be, had it grown so old at once."""
    pairs = [tier.codecs for tier in tiers if tier.codecs is not None]
    found = []
    for i, tier in enumerate(tiers[: len(pairs)]):
        limit = None if tier.tokens is None else tier.tokens // method.page
        found.append(Age(_lossy(method, pairs[: i + 1], rope), limit))
    return found


def _lossy(method: Method, pairs: list, rope: Rope | None) -> Lossy:
    """Through the codecs, which have tests of their own; a lossless method gives back what it got."""
    if getattr(method, "bits", 4) is None:
        return lambda keys, values, positions: (keys, values)
    own = rope if pairs[0][0].site == "k_pre" else None

    def kv(number: int, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        stored = pairs[0][number].encode(rows, valid)
        for pair in pairs[1:]:
            stored = pair[number].truncate(stored)
        return pairs[-1][number].decode(stored, HEADS)

    def through(keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k, v, p = torch.from_numpy(keys), torch.from_numpy(values), torch.from_numpy(positions)
        k = k if own is None else own.undo(k, p)
        if pairs[0][0].joint:
            stored = pairs[0][0].encode(torch.cat([k, v], 1), p >= 0)
            k, v = (codec.decode(stored, HEADS) for codec in pairs[0])
        else:
            k, v = kv(0, k, p >= 0), kv(1, v, p >= 0)
        return (k if own is None else own.apply(k, p)).numpy(), v.numpy()

    return through


def _compare(keys: torch.Tensor, values: torch.Tensor, dense: Dense) -> None:
    assert keys.shape == dense.keys.shape
    at = np.nonzero(dense.shown)
    for got, want, what in ((keys, dense.keys, "keys"), (values, dense.values, "values")):
        _close(got.numpy()[at], want[at], what)


def _close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    worst = float(np.abs(got - want).max(initial=0.0))
    assert worst < TOLERANCE, f"{what} differ by {worst:.3g}"
