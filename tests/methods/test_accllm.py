"""AccLLM: what is held never grows, and attention sees the sinks and the recent tokens alone."""

import pytest
import torch

from kvshrink.cache.attend import attend
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.accllm import AccLLM
from kvshrink.methods.quant.rtn import RTN
from tests.cache.build import feed, make

SHAPE = LayerShape(2, 32, torch.float32)


def test_bytes_stop_growing():
    method, held = AccLLM(recent=128), []
    cache = make(method, SHAPE, [{}])
    for _ in range(40):
        x = torch.randn(1, 2, 32, 32)
        feed(cache, [x], [x.clone()])
        held.append(cache.layers[0].held().total)
    assert held[8] == held[-1] == method.layer_bytes(SHAPE, {}, 40 * 32) > held[3]
    a_page = 2 * 2 * (32 * 32 * 4 // 8 + 32 * 4)  # keys and values of 2 heads: codes, and 32 scales and minima
    assert method.body_bytes(SHAPE, {}, 1000) == 4 * a_page


def test_attention_is_that_of_4_bits_with_the_middle_masked():
    """Beside plain 4-bit codes of everything, whose mask hides what AccLLM dropped."""
    ours, plain = make(AccLLM(recent=64, window=16), SHAPE, [{}]), make(RTN(bits=4, window=16), SHAPE, [{}])
    out = []
    for tokens in (300, 1):
        x = torch.randn(2, 1, 2, tokens, 32)
        pair = [feed(cache, [x[0].clone()], [x[1].clone()])[0] for cache in (ours, plain)]
    query = torch.randn(1, 4, 1, 32)
    first = int(ours.layers[0].body.ages[0].pages.first[0, 0])
    mask = torch.ones(1, 1, 1, 301, dtype=torch.bool)
    mask[..., 4:first] = False
    assert 301 - first - ours.layers[0].window.count == 64
    for (keys, values), seen in zip(pair, (None, mask), strict=True):
        out.append(attend(query, keys, values, seen, 0.2, None, keys._kvshrink))
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)


def test_less_than_a_page_is_refused():
    with pytest.raises(SettingError, match="recent=31"):
        AccLLM(recent=31)
