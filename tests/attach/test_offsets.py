"""Keys with a large constant part: a method that loses what varies in them says so, once; others say nothing."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import kvshrink
from kvshrink import CSKV, RTN, methods

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}


def biased(size: float) -> Qwen2ForCausalLM:
    """Slow channels whose keys are nearly constant."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.normal_(0, 0.3)
        bias = layer.self_attn.k_proj.bias.view(2, 64)
        bias.zero_()
        bias[:, 31], bias[:, 63], bias[:, 30] = size, -0.7 * size, 0.6 * size
    return model


@pytest.mark.parametrize("name", ["turboquant", "saw_int4", "rotatekv"])
def test_a_method_that_loses_it_says_so_once(name):
    model, method = biased(400), methods.build(name, {"bits": 4})
    if method.needs_fit:
        method = kvshrink.fit(model, method, torch.randint(3, 97, (4, 256)), progress=False)
    with pytest.warns(UserWarning, match=f"key biases of 2 layers .layer 0 first. are so large that {name}"):
        kvshrink.make_cache(model, method)
    kvshrink.make_cache(model, method)  # a warning is an error in tests


@pytest.mark.parametrize(
    "method", [RTN(bits=4), methods.build("kivi", {}), methods.build("kvquant", {}), CSKV(keep=0.5)]
)
def test_one_that_does_not_says_nothing(method):
    model = biased(400)
    if method.needs_fit:
        method = kvshrink.fit(model, method, torch.randint(3, 97, (4, 256)), progress=False)
    kvshrink.make_cache(model, method)


def test_small_biases_are_no_matter():
    kvshrink.make_cache(biased(5), methods.build("turboquant", {"bits": 4}))


def test_a_warning_that_is_an_error_leaves_the_model_usable():
    model, method = biased(400), methods.build("turboquant", {"bits": 4})
    with pytest.raises(UserWarning):  # as pytest's settings make of it
        kvshrink.make_cache(model, method)
    cache = kvshrink.make_cache(model, method)
    assert torch.isfinite(model(torch.randint(3, 97, (1, 90)), past_key_values=cache).logits).all()
