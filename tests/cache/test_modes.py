"""A cache may be filled in one torch mode and used in another."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvshrink import RTN, make_cache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=61,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("length", [20, 100], ids=["in the window", "beyond it"])
def test_prefill_under_inference_mode_then_generate_outside(model, length):
    ids = torch.randint(1, 61, (2, length))
    settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
    cache = make_cache(model, RTN(bits=None, window=8))
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 1]))
        fork = copy.deepcopy(cache)
        fork.crop(-3)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), wanted)
    assert torch.equal(model.generate(ids, past_key_values=fork, **settings), wanted)


def test_with_gradients_on_the_prefill_learns_and_the_store_keeps_no_graph(model):
    ids = torch.randint(0, 61, (1, 30))
    cache = make_cache(model, RTN(bits=4))
    model(ids, past_key_values=cache).logits.sum().backward()
    got = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(ids, use_cache=False).logits.sum().backward()
    torch.testing.assert_close(got, model.model.layers[0].self_attn.k_proj.weight.grad)
    model.zero_grad()
    assert not any(t.requires_grad for t in cache.state_dict().values())
