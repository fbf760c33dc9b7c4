"""Full keys and values in our pages: exact, whatever is done with the cache, and read in place by the kernels."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import Full, make_cache
from kvshrink.methods._stats import LayerShape
from tests.cache.build import feed, make


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    config = LlamaConfig(num_hidden_layers=2, intermediate_size=64, vocab_size=97, **shape)
    net = LlamaForCausalLM(config).eval().to(request.param)
    yield net
    kvshrink.detach(net)


@torch.inference_mode()
def logits(model, cache, ids):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([150, *[1] * 60], 1)], 1)


def test_a_decode_is_the_full_caches(model):
    ids = torch.randint(0, 97, (3, 210), generator=torch.Generator().manual_seed(1))
    wanted = logits(model, DynamicCache(config=model.config), ids).float()
    cache = make_cache(model, Full())
    found = logits(model, cache, ids).float()
    off = 1e-4 if model.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, wanted, atol=off * float(wanted.abs().max()), rtol=0)
    assert all(layer.pages for layer in cache.compressed)
    # a fork goes its own way and holds no token twice
    fork, held = copy.deepcopy(cache), cache.nbytes
    more = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        model(more, past_key_values=fork)
    assert cache.nbytes == held
    assert cache.get_seq_length() + 40 == fork.get_seq_length()


def test_its_bytes_are_those_of_a_full_cache_and_of_its_room():
    shape = LayerShape(2, 16, torch.bfloat16)
    cache, rows = make(Full(), shape, [{}]), torch.randn(1, 2, 4096, 16).bfloat16()
    feed(cache, [rows], [rows])
    full = 4096 * shape.token_bytes
    assert full <= cache.nbytes < 1.05 * full
