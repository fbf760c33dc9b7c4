"""The window at 8 bits: what a token loses, that it loses it once, and what the window takes."""

import pytest
import torch

from kvshrink.cache.window import Window
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._window import WindowForm
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.spectral import Spectral
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store.growth import slots_for
from tests.cache.build import assemble

B, H, D = 2, 3, 16
SHAPE = LayerShape(H, D, torch.bfloat16)


def rows(tokens, seed=0):
    return torch.randn(B, H, tokens, D, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 400.0])
def test_a_token_is_off_by_half_a_step_of_its_head_at_most(dtype, scale):
    given = (rows(50).float() * scale).to(dtype)
    form = WindowForm(8, LayerShape(H, D, dtype))
    found = form.rows(form.stored(given))
    step = given.float().abs().amax(-1, keepdim=True) / 127
    rounding = given.float().abs() * torch.finfo(dtype).eps  # of the result to the model's dtype
    assert found.dtype == dtype
    assert ((found.float() - given.float()).abs() <= 0.53 * step + rounding).all()  # the scale has 8 bits itself


def test_the_largest_numbers_of_a_half_stay_finite():
    form = WindowForm(8, LayerShape(H, D, torch.float16))
    assert form.rows(form.stored(torch.full((1, 1, 1, D), 65504.0).half())).isfinite().all()


def test_zeros_and_empty_rooms_are_zeros():
    form = WindowForm(8, SHAPE)
    assert not form.rows(form.stored(torch.zeros(1, 1, 3, D).bfloat16())).any()
    assert not form.rows(torch.zeros(1, 1, 3, D + 2, dtype=torch.uint8)).any()


@pytest.mark.parametrize("bits", [None, 8])
def test_tokens_move_as_they_are_stored(bits):
    """bfloat16 numbers rounded a second time would be others; and what a window gives is what it was given."""
    form = WindowForm(bits, SHAPE)
    window, keys, values = Window(12, form), rows(60, 1), rows(60, 2)  # 4 tokens, and a page of 8
    want, at = [form.rows(form.stored(x)) for x in (keys, values)], 0
    for count in (5, 4, 1, 9, 1, 1, 1, 1, 30, 1, 1):
        given = window.put(keys[:, :, at : at + count], values[:, :, at : at + count], True) or window.view()
        at, total = at + count, given[0].shape[2]
        if total >= 12:
            window.keep(*given, (total - 4) // 8 * 8)
        for found, right in zip(window.view(), want, strict=True):
            assert torch.equal(found, right[:, :, at - window.count : at])
    assert at == 55


def test_a_window_takes_what_is_promised():
    exact, rounded = RTN(bits=4), RTN(bits=4, window_bits=8)
    assert exact.window_form(SHAPE).token_bytes == 2 * H * D * 2
    assert rounded.window_form(SHAPE).token_bytes == 2 * H * (D + 2)
    window = Window(64, rounded.window_form(SHAPE))
    window.put(rows(10), rows(10), True)
    assert sum(t.nbytes for t in window.tensors().values()) == B * 64 * rounded.window_form(SHAPE).token_bytes


def test_methods_of_one_byte_budget_round_their_window_by_themselves():
    def bits(method):
        return method.window_form(SHAPE).bits

    assert bits(Spectral()) == bits(CSKV(budget=0.1)) == bits(RTN(window_bits=8)) == 8
    assert bits(Spectral(window_bits=None)) is bits(CSKV()) is bits(RTN()) is None
    with pytest.raises(SettingError, match="window_bits=4"):
        RTN(window_bits=4)


def test_a_layer_with_large_key_biases_keeps_an_exact_window_unless_told():
    """As Qwen2's: eight bits of a token would go to a few of its channels."""
    swamped = LayerShape(H, D, torch.bfloat16, swamped=True)
    for method in (Spectral(), CSKV(budget=0.2)):
        assert method.window_form(swamped).bits is None
        rounded = [method.layer_bytes(shape, {}, 70) for shape in (SHAPE, swamped)]
        assert rounded[1] - rounded[0] == 64 * 2 * H * (D * 2 - D - 2)
        # and so does any, until it has given the sinks
        assert method.layer_bytes(SHAPE, {}, 50) == slots_for(50) * SHAPE.token_bytes
    assert RTN(window_bits=8).window_form(swamped).bits == 8


@pytest.mark.parametrize("cut", [1, 8, 40, 60, 100])
def test_sinks_are_exact_however_a_prompt_comes(cut):
    """They come out of the window, which is exact until it has given them; then it is rounded."""
    method = RTN(bits=4, window_bits=8)
    cache = assemble(method, SHAPE, [method.tiers(SHAPE, {})])
    keys = rows(100, 4)
    keys[:, :, 0, 3] = 200.0  # of which 8 bits would take all other channels with them
    for part in (slice(0, cut), slice(cut, 100)):
        tokens = keys[:, :, part]
        if not tokens.shape[2]:
            continue
        positions = torch.arange(100)[None, part].expand(B, -1).int()
        cache.stage(0, positions, None, None, True, "model", None)
        cache.update(tokens.clone(), tokens.clone(), 0)
    layer = cache.layers[0]
    assert torch.equal(layer.sinks.keys, keys[:, :, :4])
    assert layer.window.form.bits == 8
    assert layer.held().window == B * 64 * layer.window.form.token_bytes
    cache.crop(2)
    assert layer.window.count == 0
    assert not layer.sinks.full
