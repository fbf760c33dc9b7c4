"""Rows that join, leave and fork: the same tokens as each alone, nothing stored copied, little taken for few tokens."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvshrink
from kvshrink.cache import attend
from kvshrink.cache.cache import KVCache
from kvshrink.errors import CacheError
from kvshrink.methods import build
from kvshrink.methods._stats import LayerShape
from kvshrink.store.bytes import nbytes
from kvshrink.store.pool import Run
from tests.cache.build import feed, make
from tests.scenarios.families import FAMILIES, VOCAB

LENGTHS = (100, 7, 161, 64)
SHAPE = LayerShape(2, 16, torch.float32)


@pytest.fixture(params=["llama", "gemma3"])
def model(request):
    made = FAMILIES[request.param].build()
    yield made
    kvshrink.detach(made)


def prompts() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCAB, (1, n), generator=g) for n in LENGTHS]


def stepped(model, cache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one more token of each row."""
    mask = None
    if isinstance(cache, KVCache):
        mask = torch.cat([cache.attention_mask, torch.ones(len(tokens), 1, dtype=torch.int64)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        return model(tokens, past_key_values=cache, attention_mask=mask, position_ids=positions).logits[:, -1]
    return model(tokens, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("bits", [None, 4])
def test_joined_rows_say_what_each_says_alone_and_again_apart(model, bits, monkeypatch):
    alone, copied = [], []
    for ids in prompts():
        alone.append(kvshrink.make_cache(model, kvshrink.RTN(bits=bits)))
        model(ids, past_key_values=alone[-1])
    take = Run.take
    monkeypatch.setattr(Run, "take", lambda *a: copied.append(a) or take(*a))
    batch = KVCache.join(alone)
    apart = batch.split()
    assert copied == []
    assert batch.get_seq_length() == max(LENGTHS)
    assert [c.get_seq_length() for c in apart] == list(LENGTHS)
    assert batch.attention_mask.sum(1).tolist() == list(LENGTHS)
    for step in range(40):
        tokens = torch.randint(1, VOCAB, (len(LENGTHS), 1), generator=torch.Generator().manual_seed(step))
        together = stepped(model, batch, tokens)
        for i, one in enumerate(zip(alone, apart, strict=True)):
            for cache in one:
                torch.testing.assert_close(
                    together[i], stepped(model, cache, tokens[i : i + 1])[0], rtol=1e-3, atol=1e-4
                )
    late = batch.split()[1]
    ids = torch.cat(
        [
            prompts()[1],
            *(
                torch.randint(1, VOCAB, (len(LENGTHS), 1), generator=torch.Generator().manual_seed(s))[1:2]
                for s in range(40)
            ),
        ],
        1,
    )
    if bits is None:  # as if it had never been in a batch
        full = DynamicCache(config=model.config)
        model(ids, past_key_values=full)
        token = torch.tensor([[5]])
        torch.testing.assert_close(stepped(model, late, token), stepped(model, full, token), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_joined_is_refused(model):
    one, other = (kvshrink.make_cache(model, kvshrink.RTN(bits=bits)) for bits in (8, 4))
    with pytest.raises(CacheError, match="join takes one or more caches"):
        KVCache.join([])
    model(prompts()[0], past_key_values=one)
    with pytest.raises(CacheError, match="cache 1 of 2 is empty"):
        KVCache.join([one, other])
    model(prompts()[0], past_key_values=other)
    with pytest.raises(CacheError, match="cache 1 of 2 is of another model or method"):
        KVCache.join([one, other])


def alive(*caches: KVCache) -> int:
    layers = [layer for cache in caches for layer in cache.compressed]
    kept = {id(age.kept): age.kept for layer in layers for age in layer.body.ages}
    return nbytes(t for layer in layers for t in layer.tensors()) + sum(k.index_bytes for k in kept.values())


@pytest.mark.parametrize("name", ["rtn", "snapkv"])
def test_a_fork_shares_what_is_stored_and_each_goes_its_own_way(name):
    cache = make(build(name, {"bits": 4}), SHAPE, [{}])
    keys, values = torch.randn(2, 1, 2, 4000, 16)
    feed(cache, [keys], [values])
    one, fork = alive(cache), copy.deepcopy(cache)
    assert alive(cache, fork) < 1.03 * one
    before = fork.compressed[0].body.youngest.records()["k.codes"].clone()
    for _ in range(70):
        feed(cache, [torch.randn(1, 2, 1, 16)], [torch.randn(1, 2, 1, 16)])
    assert torch.equal(fork.compressed[0].body.youngest.records()["k.codes"], before)
    assert fork.get_seq_length() == 4000
    feed(fork, [torch.randn(1, 2, 1, 16)], [torch.randn(1, 2, 1, 16)])
    assert not torch.equal(
        fork.compressed[0].window.view()[0][:, :, -1], cache.compressed[0].window.view()[0][:, :, -1]
    )


def test_beams_hold_their_prompt_once():
    cache = make(kvshrink.RTN(bits=8), SHAPE, [{}])
    feed(cache, [torch.randn(1, 2, 4096, 16)], [torch.randn(1, 2, 4096, 16)])
    one = alive(cache)
    cache.batch_repeat_interleave(8)
    assert alive(cache) < 1.05 * one
    for _ in range(40):
        feed(cache, [torch.randn(8, 2, 1, 16)], [torch.randn(8, 2, 1, 16)])
        cache.reorder_cache(torch.randint(0, 8, (8,)))
    assert alive(cache) < 1.15 * one


@pytest.mark.parametrize("tokens", [1, 10, 40, 63])
def test_few_tokens_hold_little_more_than_a_full_cache(model, tokens):
    cache = kvshrink.make_cache(model, kvshrink.RTN(bits=4))
    model(torch.randint(1, VOCAB, (1, tokens)), past_key_values=cache)
    report = cache.report()
    assert report.byte_ratio <= (1.6 if tokens >= 10 else 4.5)


def test_a_batch_of_snapshots_is_each_by_itself():
    """What a server does with caches that it has not joined: of other lengths, one of them with a mask."""
    caches, parts = [], []
    for tokens in (300, 40, 129):
        cache = make(kvshrink.RTN(bits=4), SHAPE, [{}])
        feed(cache, [torch.randn(1, 2, tokens, 16)], [torch.randn(1, 2, tokens, 16)])
        caches.append(cache)
        feed(cache, [torch.randn(1, 2, 30, 16)], [torch.randn(1, 2, 30, 16)])
        layer = cache.compressed[0]
        parts.append((torch.randn(1, 4, 1, 16), layer.window.view(), layer.snapshot(None)))
    masks = [None, torch.rand(1, 1, 1, 70) > 0.3, None]
    queries, exact, snapshots = zip(*parts, strict=True)
    found = attend.attend_all(queries, exact, masks, 0.25, None, snapshots)
    for got, (query, pair, snapshot), mask in zip(found, parts, masks, strict=True):
        keys, values = attend.rebuild(snapshot, *pair)
        want = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=0.25, enable_gqa=True
        )
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_prompt_that_nothing_ranked_joins_one_with_running_scores():
    """As of caches filled without queries: its tokens start at 0."""
    ranked, plain = (make(build("h2o", {}), SHAPE, [{}]) for _ in range(2))
    feed(ranked, [torch.randn(1, 2, 90, 16)], [torch.randn(1, 2, 90, 16)], asked=True)
    feed(plain, [torch.randn(1, 2, 70, 16)], [torch.randn(1, 2, 70, 16)])
    window = KVCache.join([plain, ranked]).compressed[0].window
    assert window.scores.shape == (2, 2, window.count)
    assert not window.scores[0].any()
    own = ranked.compressed[0].window
    assert own.scores.any()
    assert torch.equal(window.scores[1, :, -own.count :], own.scores[0])
