from itertools import pairwise

import pytest
import torch

import kvshrink
from kvshrink.methods.evict.pyramidkv import PyramidKV
from kvshrink.methods.evict.snapkv import SnapKV
from tests.cache.build import feed
from tests.methods.evicting import SHAPE, Steps, cache_of, pooled, refused


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("steepness", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_shares_fall_in_a_line_and_are_the_ratio_in_the_mean(count, steepness, ratio):
    method = PyramidKV(ratio=ratio, steepness=steepness)
    shares = [method.at_layer(i, count).ratio for i in range(count)]
    assert sum(shares) / count == pytest.approx(ratio)
    assert max(shares) <= 1 + 1e-9
    falls = [a - b for a, b in pairwise(shares)]
    assert falls == pytest.approx([falls[0]] * len(falls)) if falls else shares == [ratio]
    assert all(fall >= -1e-12 for fall in falls)
    if count > 1:  # the first layer holds everything before the last one may hold as little as it should
        wanted = ratio / steepness if 2 * ratio - ratio / steepness <= 1 else 2 * ratio - 1
        assert shares[-1] == pytest.approx(wanted)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_each_layer_keeps_what_the_last_queries_look_at(index):
    """As SnapKV, by each layer's own share."""
    own = PyramidKV(ratio=0.3, observed=16, pool=5).at_layer(index, 4)
    Steps(own, pads=45, rule=pooled(16, 5)).run(400, 90, *[1] * 40)


def test_layers_of_a_cache_hold_fewer_tokens_the_deeper_they_are():
    cache = cache_of(PyramidKV(ratio=0.3), [{}] * 4)
    rows = [torch.randn(1, 2, 1000, 8) for _ in range(4)]
    feed(cache, rows, [r.clone() for r in rows], asked=True)
    held = [int(layer.body.youngest.tokens[0, 0]) for layer in cache.compressed]
    shares = [0.585 - i * 0.19 for i in range(4)]  # from 2 * 0.3 - 0.015 to 0.3 / 20
    assert held == [-(-int(round(30 * s, 6) * 1000) // 1000) * 32 for s in shares]
    promised = [layer.method.layer_bytes(SHAPE, {}, 1000) for layer in cache.compressed]
    assert [layer.held().total for layer in cache.compressed] == promised


def test_a_model_s_layers_hold_a_pyramid_and_no_more_bytes_than_even_ones(request):
    model, _ = kvshrink.reference_model("float32")
    request.addfinalizer(lambda: kvshrink.detach(model))
    ids = torch.randint(5, 3000, (1, 800), generator=torch.Generator().manual_seed(0))
    counts, held = [], []
    for method in (PyramidKV(ratio=0.3, steepness=10), SnapKV(ratio=0.3)):
        cache = kvshrink.make_cache(model, method)
        model(input_ids=ids, past_key_values=cache)
        counts.append([int(layer.body.youngest.tokens[0, 0]) // 32 for layer in cache.compressed])
        held.append(cache.nbytes)
    assert counts == [[14, 10, 6, 1], [8, 8, 8, 8]], "of 24 pages, shares from 0.57 down to 0.03"
    assert held[0] <= held[1]


def test_settings():
    refused(PyramidKV, {"steepness": 0.9}, {"pool": 2}, {"observed": 0}, {"ratio": 1.2}, {"most": 5})
