"""Budgets: the setting they choose holds the bytes they promise, on the cache itself."""

import pytest
import torch

from kvshrink import CSKV, RTN, attach, detach, fit, make_cache, reference_model
from kvshrink.attach.budget import TOLERANCE, at_byte_ratio, promised
from kvshrink.errors import SettingError
from kvshrink.kernels.ceilings import Ceilings
from kvshrink.methods.evict.streaming_llm import StreamingLLM


@pytest.fixture(scope="module")
def model():
    model, _ = reference_model()
    attach(model)
    yield model
    detach(model)


@pytest.mark.parametrize("tokens", [1000, 3000])
@pytest.mark.parametrize("target", [0.3, 0.1])
@pytest.mark.parametrize("method", [CSKV(), CSKV(bits=4), StreamingLLM()], ids=["cskv", "cskv4", "streaming"])
def test_a_budget_is_met_by_the_cache_itself(model, method, target, tokens):
    chosen = at_byte_ratio(method, target, model, tokens)
    rows = torch.randint(3, 3000, (1, tokens))
    fitted = fit(model, chosen.method, rows[:, :512], progress=False) if method.needs_fit else chosen.method
    cache = make_cache(model, fitted)
    with torch.inference_mode():
        model(input_ids=rows, past_key_values=cache, logits_to_keep=1)
    held = cache.report()
    # positions are taken in chunks of 256 tokens
    assert held.byte_ratio == pytest.approx(chosen.byte_ratio, abs=4 * 256 / held.full)
    assert chosen.reached
    assert (1 - TOLERANCE) * target <= chosen.byte_ratio <= (1 + TOLERANCE) * target
    assert type(chosen.method) is type(method)
    assert chosen.method.window == method.window or isinstance(method, StreamingLLM)


@pytest.mark.parametrize(("flops", "heads"), [(1e30, 2), (1.0, 1)])
def test_a_budget_settles_what_depends_on_the_device(model, monkeypatch, flops, heads):
    """Bytes are promised before a fit, so the number of heads per basis must be known."""
    monkeypatch.setattr("kvshrink.methods.lowrank.cskv.measure", lambda device, dtype: Ceilings(flops, 1e9))
    auto, given = CSKV(bits=4, group_heads="auto"), CSKV(bits=4, group_heads=heads)
    assert at_byte_ratio(auto, 0.1, model, 2000) == at_byte_ratio(given, 0.1, model, 2000)
    assert promised(auto, model, 2000) == promised(given, model, 2000) > 0


def test_it_is_the_largest_setting_under_the_target(model):
    for method in (CSKV(bits=4), StreamingLLM()):
        chosen = at_byte_ratio(method, 0.15, model, 2000).method
        values = list(method.budget_values(chosen_shape(model), 2000))
        one_more = values[values.index(getattr(chosen, method.budget_setting)) + 1]
        assert promised(chosen, model, 2000) <= 0.15
        assert promised(type(method)(**{**chosen.settings(), method.budget_setting: one_more}), model, 2000) > 0.15


def chosen_shape(model):
    from kvshrink.attach.factory import shapes

    return shapes(attach(model))[0]


def test_what_cannot_be_reached_stands_at_its_nearest_setting(model):
    few = at_byte_ratio(RTN(), 0.05, model, 4000)
    assert (few.reached, few.method.bits) == (False, 1)
    assert few.byte_ratio == pytest.approx(promised(RTN(bits=1), model, 4000))
    between = at_byte_ratio(RTN(), 0.18, model, 4000)  # 1 bit takes 14 %, 2 bits 20 %
    assert (between.reached, between.method.bits) == (False, 2)
    assert at_byte_ratio(CSKV(), 0.001, model, 4000).method.keep == 1 / 128


@pytest.mark.parametrize("target", [0, -0.1, 1.5, float("nan")])
def test_a_budget_outside_of_0_to_1_is_refused(model, target):
    with pytest.raises(SettingError, match="not possible"):
        at_byte_ratio(RTN(), target, model, 1000)
