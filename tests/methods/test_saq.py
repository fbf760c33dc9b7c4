"""SAQ: bits by age in bytes, and a needle's way down the staircase."""

import dataclasses

import pytest
import torch

from kvshrink import CSKV
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.saq import SAQ
from tests.cache.build import feed, make

SHAPE = LayerShape(2, 32, torch.float32)


def body(cache) -> list[int]:
    """Tokens of each age, the youngest first."""
    return [int(age.pages.tokens.max(initial=0)) for age in cache.layers[0].body.ages]


def test_tokens_step_down_by_age():
    cache = make(SAQ(window=32, sinks=0, ages=(100, 64)), SHAPE, [{}])  # 100 tokens: three whole pages
    rows = torch.randn(1, 2, 32 + 32 * 10, 32)
    feed(cache, [rows], [rows.clone()])
    assert body(cache) == [96, 64, 160]
    feed(cache, [rows[:, :, :33]], [rows[:, :, :33].clone()])
    assert body(cache) == [96, 64, 192]


def test_a_token_of_each_age_costs_its_bits():
    """Scales: 16 + 16 bits for each channel of a page, and for 32 channels of a token, so a bit a number."""
    shape = LayerShape(8, 128, torch.float16)
    method = SAQ(window=32, sinks=0, ages=(256, 1024))
    for pages, bits in ((8, 9 * 8), (40, 9 * 8 + 5 * 32), (100, 9 * 8 + 5 * 32 + 3 * 60)):
        assert method.body_bytes(shape, {}, pages) == bits * 32 * 2 * 1024 // 8
    held = [method.layer_bytes(shape, {}, n) / (n * shape.token_bytes) for n in (10**4, 10**5, 10**6)]
    assert held[0] > held[1] > held[2] > 3 / 16
    assert held[2] == pytest.approx(3 / 16, rel=0.01)


def test_a_page_that_grew_old_is_what_its_first_codes_say():
    """By hand: 8-bit codes of the exact rows, their top bits, the middle of what they leave open."""
    cache = make(SAQ(window=32, sinks=0, ages=(64, 64)), SHAPE, [{}])
    rows = torch.randn(1, 2, 32 * 9, 32) * 3
    for part in rows.split(17, 2):  # a page is encoded long before it is old
        feed(cache, [part], [part.clone()])
    layer = cache.layers[0]
    for age, spare in zip(layer.body.ages, (0, 4, 6), strict=True):
        (key_codec, value_codec), columns = age.tier.codecs, age.pages.first[0]
        stored = age.pages.records()
        for part, codec, axis in (("k.", key_codec, 2), ("v.", value_codec, 3)):
            page = rows[:, :, columns[0] : columns[0] + 32]
            low, high = page.amin(axis, keepdim=True), page.amax(axis, keepdim=True)
            scale, low = ((high - low) / 255).half().float(), low.half().float()
            codes = ((page - low) / scale).round().clamp(0, 255).int() >> spare
            wanted = (codes * 2**spare + (2**spare - 1) / 2) * scale + low
            got = codec.decode(stored.under(part), 2)[:, :, :32]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_latents_grow_old_too(stats_of):
    shape = LayerShape(4, 20, torch.float32)
    method = CSKV(keep=0.7, codec="saq", window=32, sinks=0)
    fitted = method.fit_layer(stats_of(shape))
    cache = make(method, shape, [fitted])
    rows = stats_of(shape).sample.keys_pre_rope.transpose(0, 1)[None].repeat(1, 1, 10, 1)[:, :, : 32 * 60]
    feed(cache, [rows], [rows.clone()])
    assert body(cache) == [256, 1024, 32 * 59 - 1280]
    assert cache.layers[0].held().total == method.layer_bytes(shape, fitted, rows.shape[2])
    ages = cache.layers[0].body.ages
    assert all(age.tier.codecs[0].up is ages[0].tier.codecs[0].up for age in ages), "one basis for all ages"
    smooth = ages[0].tier.codecs[0].smooth(rows)
    errors = []
    for age in ages:
        got = age.tier.codecs[0].decode(age.pages.records().under("k."), 4)
        at = int(age.pages.first[0, 0])
        errors.append(float((got - smooth[:, :, at : at + got.shape[2]]).norm() / got.norm()))
    assert errors[0] * 8 < errors[1] < errors[2] / 2 < 0.2


@pytest.mark.parametrize("ages", [(1,), (1, 2, 3), (-1, 5), (1.0, 2), "ab", None])
def test_ages_that_are_none_are_refused(ages):
    with pytest.raises((SettingError, TypeError)):
        dataclasses.replace(SAQ(), ages=ages)
