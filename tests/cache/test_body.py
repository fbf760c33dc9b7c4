"""A body of several ages: one tier is no ladder at all, and what a step reads does not move under it."""

import copy
import dataclasses

import pytest
import torch

from kvshrink.cache import writing
from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.layout import empty_pages
from kvshrink.errors import CacheError
from kvshrink.methods._roles import Tier
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.accllm import AccLLM
from kvshrink.methods.quant.rtn import RTN
from kvshrink.methods.quant.saq import SAQ
from tests.cache.build import assemble, feed, make

SHAPE = LayerShape(2, 16, torch.float32)


def rows(tokens: int) -> tuple[list, list]:
    k, v = torch.randn(2, 2, 2, tokens, 16)
    return [k], [v]


def test_a_ladder_whose_first_step_is_never_left_is_no_ladder():
    """Bit for bit: stored tensors, and what attention gives."""
    method = RTN(bits=4)
    pair = method.codecs(SHAPE, {})
    ladder = (Tier(pair, 10**6), Tier(pair, 64), Tier(None))
    one, other = assemble(method, SHAPE, [(Tier(pair),)]), assemble(method, SHAPE, [ladder])
    for tokens in (500, 1, 40, 1, 100):
        given, query, out = rows(tokens), torch.randn(2, 4, tokens, 16), []
        for cache in (one, other):
            keys, values = feed(cache, [x.clone() for x in given[0]], [x.clone() for x in given[1]])[0]
            snapshot = getattr(keys, "_kvshrink", None)
            out.append(keys if snapshot is None else attend(query, keys, values, None, 0.25, None, snapshot))
        assert torch.equal(*out)
    for name in ("scale", "codes"):
        a, b = (c.layers[0].pages.records()[f"k.{name}"] for c in (one, other))
        assert torch.equal(a, b)
    assert one.layers[0].held() == other.layers[0].held()


@pytest.mark.parametrize("method", [SAQ(ages=(64, 96)), AccLLM(recent=128)])
def test_a_long_turn_reads_the_pages_as_they_were_before_it(method):
    """The pages that a turn pushes down, or out, are read before they go: as if tokens had come one by one."""
    cache = make(method, SHAPE, [{}])
    feed(cache, *rows(300))
    layer, before = cache.layers[0], copy.deepcopy(cache.layers[0])
    (k,), (v,) = rows(400)
    keys, values = feed(cache, [k], [v])[0]
    query = torch.randn(2, 4, 400, 16)
    out = attend(query, keys, values, None, 0.25, None, keys._kvshrink)
    window = [torch.cat([a, b], 2) for a, b in zip(before.window.view(), (k, v), strict=True)]
    asked = dataclasses.replace(
        before.snapshot(None), positions=layer.table.positions, seen=layer.seen, first=300 - before.window.count
    )
    torch.testing.assert_close(out, attend(query, *window, None, 0.25, None, asked))
    assert layer.pages.first[0, 0] > before.pages.first[0, -1], "no page of that age is left"


def test_attention_over_the_ages_is_attention_over_rebuilt_keys():
    cache = make(SAQ(ages=(64, 96), sinks=0), SHAPE, [{}])
    feed(cache, *rows(400))
    keys, values = feed(cache, *rows(3))[0]
    snapshot, query = keys._kvshrink, torch.randn(2, 4, 3, 16)
    assert [len(tier.pages) for tier in snapshot.tiers] == [
        len(age.pages) for age in reversed(cache.layers[0].body.ages)
    ]
    all_keys, all_values = rebuild(snapshot, keys, values)
    mask = torch.ones(3, 403, dtype=torch.bool).tril(400)
    scores = (query @ all_keys.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(~mask, -torch.inf)
    wanted = scores.softmax(-1) @ all_values.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(query, keys, values, None, 0.25, None, snapshot), wanted, rtol=1e-4, atol=1e-5)


def test_a_save_of_one_tier_has_no_other_names_and_a_ladder_takes_it():
    cache = make(RTN(bits=8), SHAPE, [{}])
    feed(cache, *rows(300))
    values, tensors = cache.layers[0].state()
    assert set(values) == {"seen", "window", "starts", "rounded", "scores", "sinks", "watched", "pages"}
    assert {name.split(".")[0] for name in tensors} == {"window", "sinks", "pages"}
    pair = RTN(bits=8).codecs(SHAPE, {})
    layer = assemble(RTN(bits=8), SHAPE, [(Tier(pair, 64), Tier(None))]).layers[0]
    layer.restore(values, tensors, [page or None for page in empty_pages(layer.tiers, SHAPE, 32, torch.device("cpu"))])
    assert len(layer.body) == len(cache.layers[0].body) > 0


def test_tokens_that_are_dropped_cannot_come_back():
    cache = make(AccLLM(recent=128), SHAPE, [{}])
    feed(cache, *rows(400))
    held = cache.layers[0].window.count + 128
    with pytest.raises(CacheError, match=rf"^cannot crop {held + 1} tokens: AccLLM holds only the last {held} "):
        cache.crop(-held - 1)
    cache.crop(-held + 10)
    assert cache.layers[0].body.tokens == 10


def test_what_would_be_dropped_at_once_is_never_encoded(monkeypatch):
    cache, encoded = make(AccLLM(recent=128), SHAPE, [{}]), []
    real = writing.encode
    monkeypatch.setattr(
        writing, "encode", lambda codecs, keys, *rest: encoded.append(keys.shape[2]) or real(codecs, keys, *rest)
    )
    feed(cache, *rows(1000))
    assert encoded == [128]


def test_a_method_that_may_drop_asks_for_our_attention():
    cache = make(AccLLM(recent=128), SHAPE, [{}])
    feed(cache, *rows(400))
    with pytest.raises(CacheError, match="drops tokens"):
        feed(cache, *rows(1), own=False)
