"""Importance of tokens, against a softmax in loops; which queries ask; and which tokens of latents are chosen."""

import math

import pytest
import torch

from kvshrink import CSKV
from kvshrink.cache import scoring, writing
from kvshrink.cache.scoring import ProbeQueries, received
from kvshrink.kernels.mass import cpu, reference
from kvshrink.kernels.pack import unpack
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import NormalisedAttention, probes
from kvshrink.methods._stats import LayerShape
from tests.cache.build import bases, make

H, MEMBERS, D = 2, 3, 4  # KV heads, query heads of each, channels


def importance(probe: ProbeQueries, keys: torch.Tensor, real: torch.Tensor, new: int) -> torch.Tensor:
    """ZipCache's, of the exact tokens at hand."""
    got = received(probe, keys, real, new)
    assert got.stored is None
    seen = Evidence(keys, keys, real.long(), real, new, mass=got.mass, seen=got.seen)
    return NormalisedAttention().importance(seen)


def by_hand(queries, rows, keys, real, new, softcap) -> torch.Tensor:
    """[b, h, t], a number at a time."""
    b, h, t, _ = keys.shape
    out = torch.zeros(b, h, t)
    for i in range(b):
        asking = [(x, int(row) + t - new) for x, row in enumerate(rows) if real[i, int(row) + t - new]]
        for head in range(h):
            total = [0.0] * t
            for x, column in asking:
                seen = [j for j in range(column + 1) if real[i, j]]
                for query in queries[i, head * MEMBERS : (head + 1) * MEMBERS, x]:
                    scores = [float(query @ keys[i, head, j]) for j in seen]
                    scores = scores if softcap is None else [softcap * math.tanh(s / softcap) for s in scores]
                    mass = sum(map(math.exp, scores))
                    for j, score in zip(seen, scores, strict=True):
                        total[j] += math.exp(score) / mass
            for j in range(t):
                seeing = sum(column >= j for _, column in asking)
                out[i, head, j] = total[j] / seeing if seeing and real[i, j] else 0.0
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("alive", [scoring.SCORE_ELEMENTS, 1, 200])
def test_worth_is_that_of_a_softmax_in_loops(softcap, alive, monkeypatch):
    """30 tokens, 22 of them new; pads: none, on the left and among the new, on the left, all. Junk at pads is none."""
    monkeypatch.setattr(scoring, "SCORE_ELEMENTS", alive)
    monkeypatch.setattr(reference, "TILE", alive)
    monkeypatch.setattr(cpu, "TILE", alive)
    keys, rows = torch.randn(4, H, 30, D) * 2, torch.tensor([1, 7, 20, 21])
    queries = torch.randn(4, H * MEMBERS, len(rows), D)
    real = torch.arange(30) >= torch.tensor([[0], [3], [16], [30]])
    real[1, 8:12] = False
    want = by_hand(queries, rows, keys, real, 22, softcap)
    for junk in (0.0, math.nan, math.inf):
        dirty = keys.masked_fill(~real[:, None, :, None], junk)
        asking = queries.masked_fill(~real[:, None, 8 + rows, None], junk)
        got = importance(ProbeQueries(rows, asking, softcap), dirty, real, 22)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want[2].any()


def test_a_token_is_not_worth_less_for_being_seen_by_more_queries_that_do_not_ask():
    """The official code divides by all 10 - j queries behind token j; two of them ask. Equal keys share attention."""
    probe_queries = ProbeQueries(torch.tensor([2, 9]), torch.randn(1, 1, 2, D), None)
    got = importance(probe_queries, torch.zeros(1, 1, 10, D), torch.ones(1, 10, dtype=torch.bool), 10)[0, 0]
    torch.testing.assert_close(got, torch.tensor([(1 / 3 + 1 / 10) / 2] * 3 + [1 / 10] * 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    probe_queries = ProbeQueries(torch.arange(8), torch.randn(2, H * MEMBERS, 8, D), None)
    keys, real = torch.randn(2, H, 8, D), torch.ones(2, 8, dtype=torch.bool)
    want = received(probe_queries, keys, real, 8)
    try:
        torch.set_default_dtype(dtype)
        got = received(probe_queries, keys, real, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (got.mass.dtype, got.seen.dtype) == (torch.float32, torch.float32)
    assert torch.equal(got.mass, want.mass)


def test_scores_alive_are_bounded(monkeypatch):
    sizes, real = [], reference.scored

    def noted(*given):
        for tile in real(*given):
            sizes.append(tile[-1].numel())
            yield tile

    for kind in (reference, cpu):
        monkeypatch.setattr(kind, "TILE", 5000)
        monkeypatch.setattr(kind, "scored", noted)
    probe_queries = ProbeQueries(torch.arange(100, 200), torch.randn(2, H * MEMBERS, 100, D), None)
    importance(probe_queries, torch.randn(2, H, 200, D), torch.ones(2, 200, dtype=torch.bool), 200)
    assert max(sizes) <= 5000
    seen = H * MEMBERS * sum(range(101, 201))
    assert 2 * seen <= sum(sizes) < 2 * 1.05 * seen, "once, of what each query sees"


@pytest.mark.parametrize("count", [1, 2, 20, 21, 1000])
def test_probes_are_the_last_tokens_and_as_many_random_ones(count):
    rows = probes(count)
    each = -(-count // 20)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(range(count - each, count)) <= set(rows.tolist()) <= set(range(count))
    assert len(rows) == (2 * each if count > 1 else 1)
    assert torch.equal(rows, probes(count)), "another run must choose the same"
    if count == 1000:
        early = rows[:each].float()
        assert 200 < float(early.mean()) < 750, "spread over the prompt"


@pytest.mark.parametrize("groups", [1, 2])
def test_latents_of_several_heads_take_the_mean_of_their_importance(groups, monkeypatch):
    """CSKV's keys have `groups` bases, its values one: each chooses by the heads that it stores. Encoded by parts."""
    monkeypatch.setattr(writing, "ENCODE_TOKENS", 32)
    shape = LayerShape(4, 8, torch.float32)
    method = CSKV(keep=0.5, codec="edgeqat", window=8, sinks=0, group_heads=4 // groups)
    cache = make(method, shape, [bases(shape, 16 // groups, 16, groups)])
    keys, values = torch.randn(2, 2, 4, 100, 8)
    probe_queries = ProbeQueries(probes(100), torch.randn(2, 8, len(probes(100)), 8), None)
    cache.stage(0, torch.arange(100, dtype=torch.int32)[None], None, None, True, "model", probe_queries)
    cache.update(keys, values, 0)
    each = importance(probe_queries, keys, torch.ones(2, 100, dtype=torch.bool), 100)[:, :, :64]
    for kv, g in (("k", groups), ("v", 1)):
        mean = each.unflatten(1, (g, -1)).mean(2).unflatten(2, (2, 32))
        assert torch.equal(masks(cache.layers[0], kv), mean >= mean.topk(16, -1).values[..., -1:])


def masks(layer, kv: str) -> torch.Tensor:
    """Which tokens of the body have more bits, bool [b, G, p, page]."""
    return unpack(layer.pages.records()[f"{kv}.mask"].transpose(1, 2), 1).bool()
