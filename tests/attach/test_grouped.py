"""attach/grouped.py against attention in float32 at full width, and what it leaves to sdpa."""

import pytest
import torch
from transformers import LlamaConfig

from kvshrink.attach import attention
from kvshrink.attach.attention import kvshrink_attention
from kvshrink.attach.grouped import grouped
from kvshrink.attach.implementation import Ours
from kvshrink.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ kernels: sdpa does it")
ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def wanted(query, keys, values, mask, scaling):
    group = query.shape[1] // keys.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    scores = query.float() @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ v


def inputs(dtype, tokens=1100, b=2, q=6, h=2, d=64):
    whole = torch.full((b, h, tokens + 40, d), torch.nan).to(dtype)  # what lies beyond the last token is never read
    keys, values = whole[:, :, :tokens], whole.clone()[:, :, :tokens]
    keys.normal_(), values.normal_()
    return torch.randn(b, q, 1, d).to(dtype), keys, values


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("mask_heads", [None, 1, 6, "one row"])
@pytest.mark.parametrize("tokens", [1024, 1100])
def test_as_attention_in_float32(dtype, mask_heads, tokens):
    query, keys, values = inputs(dtype, tokens)
    mask = None
    if mask_heads is not None:
        mask = torch.rand(*((1, 1) if mask_heads == "one row" else (2, mask_heads)), 1, tokens) > 0.5
        mask[..., -1] = True
    with torch.no_grad():
        got = grouped(query, keys, values, mask, 0.2)
    want = wanted(query, keys, values, mask, 0.2)
    assert got is not None
    assert got.dtype == dtype
    assert (got.float() - want).norm() / want.norm() < ERROR[dtype]


@torch.no_grad()
def test_what_sdpa_does_as_fast_is_left_to_it():
    def taken(dtype, **shape):
        return grouped(*inputs(dtype, **shape), None, None) is not None

    assert taken(torch.bfloat16, tokens=64, h=6)
    assert taken(torch.float32, tokens=1024)
    assert not taken(torch.float32, tokens=1024, h=6)
    assert not taken(torch.float32, tokens=500)
    assert not taken(torch.bfloat16, tokens=31)
    assert not taken(torch.float64, tokens=1024)
    with torch.enable_grad():
        assert not taken(torch.bfloat16, tokens=64)


@torch.no_grad()
def test_the_attention_function_takes_it_in_place_of_sdpa_alone(monkeypatch):
    asked = []

    def watched(*args):
        asked.append(args)
        return grouped(*args)

    monkeypatch.setattr(attention, "grouped", watched)
    query, keys, values = inputs(torch.bfloat16)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    module.config = LlamaConfig()
    module.config._attn_implementation_internal = Ours("sdpa")
    out, _ = kvshrink_attention(module, query, keys, values, None, scaling=0.125)
    want = wanted(query, keys, values, None, 0.125)
    assert len(asked) == 1
    assert (out.transpose(1, 2).float() - want).norm() / want.norm() < ERROR[torch.bfloat16]
    kvshrink_attention(module, query, keys, values, torch.zeros(2, 1, 1, 1100), scaling=0.125)  # an additive mask
    kvshrink_attention(module, query.repeat(1, 1, 2, 1), keys, values, None, scaling=0.125)  # two new tokens
    assert len(asked) == 1
