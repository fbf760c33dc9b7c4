"""A projection made to ask for queries is not made again in the step, and never stands for another input."""

from collections import Counter

import pytest
import torch
from torch import nn

import kvshrink
from kvshrink.attach.once import OURS, made_once
from kvshrink.methods.evict.h2o import H2O
from kvshrink.methods.evict.snapkv import SnapKV
from tests.methods.evicting import reference


@pytest.fixture
def counted(monkeypatch):
    """Rows that went through each projection."""
    rows, real = Counter(), nn.Linear.forward
    names = {}

    def forward(module, given):
        rows[names.get(id(module))] += given.shape[1]
        return real(module, given)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return rows, names


def test_all_queries_of_a_prompt_are_projected_once(counted):
    rows, names = counted
    model, _, ids = reference()
    cache = kvshrink.make_cache(model, H2O(ratio=0.5))
    names.update({id(m): n for n, m in model.named_modules()})
    with torch.inference_mode():
        got = model(input_ids=ids[:1, :200], past_key_values=cache).logits
    for part in "qkv":
        assert rows[f"model.layers.1.self_attn.{part}_proj"] == 200
    rows.clear()
    with torch.inference_mode():
        want = model(input_ids=ids[:1, :200]).logits
        assert torch.equal(got, want)
        model(input_ids=ids[:1, :200], past_key_values=kvshrink.make_cache(model, SnapKV()))
    assert rows["model.layers.1.self_attn.q_proj"] == 200 + 200 + 32, "some queries are asked besides"
    assert not any(OURS in vars(m) for m in model.modules())


def test_where_something_is_learnt_it_is_made_anew(counted):
    rows, names = counted
    model, _, ids = reference()
    cache = kvshrink.make_cache(model, H2O(ratio=0.5))  # which looks at the model, where it is the first
    names.update({id(m): n for n, m in model.named_modules()})
    model(input_ids=ids[:1, :100], past_key_values=cache)
    assert rows["model.layers.0.self_attn.q_proj"] == 200


def interrupted(outer: nn.ModuleDict, given: torch.Tensor) -> None:
    with made_once(outer, given):
        outer["plain"](given)
        raise KeyboardInterrupt


def test_only_the_very_input_is_answered_and_only_once():
    outer = nn.ModuleDict({"plain": nn.Linear(4, 4), "hooked": nn.Linear(4, 4)})
    seen = []
    outer["hooked"].register_forward_hook(lambda *a: seen.append(1))
    given, other = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    with torch.no_grad():
        with made_once(outer, given):
            want = [outer[k](given) for k in ("plain", "hooked")]
        assert OURS in vars(outer["plain"])
        assert OURS not in vars(outer["hooked"])
        assert torch.equal(outer["plain"](other), nn.Linear.forward(outer["plain"], other)), "another input"
        assert OURS not in vars(outer["plain"])
        with made_once(outer, given):
            outer["plain"](given)
        assert torch.equal(outer["plain"](given), want[0])
        with made_once(outer, given):
            outer["plain"](given).mul_(0.5)
        assert torch.equal(outer["plain"](given), want[0]), "what the asking changed is not the projection"
        with pytest.raises(KeyboardInterrupt):
            interrupted(outer, given)
        assert OURS not in vars(outer["plain"])
    with torch.no_grad(), made_once(outer, given):
        outer["plain"](given)
    assert outer["plain"](given).requires_grad


def test_a_step_that_does_not_come_leaves_nothing(monkeypatch):
    model, _, ids = reference()
    cache = kvshrink.make_cache(model, H2O(ratio=0.5))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(cache), "stage", stop)
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        model(input_ids=ids[:1, :100], past_key_values=cache)
    assert not any(OURS in vars(m) for m in model.modules())


def test_autocast_gets_what_it_rounds_itself():
    outer, given = nn.ModuleDict({"plain": nn.Linear(4, 4)}), torch.randn(1, 3, 4)
    with torch.no_grad():
        with made_once(outer, given):
            outer["plain"](given)
        with torch.autocast("cpu", torch.bfloat16):
            assert outer["plain"](given).dtype == torch.bfloat16
