"""States and models that would give wrong tokens in silence: each must be refused, or made right."""

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN
from kvshrink.errors import KVShrinkError, UnsupportedModelError
from tests.attach.test_attach import TINY, filled, logits, untouched
from tests.scenarios.families import FAMILIES
from tests.scenarios.scenarios import tokens

METHOD = RTN(bits=None, window=8)
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
SHARED = {
    **TINY,
    **PER_LAYER,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA3N = {**SHARED, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4}
SINKS = {
    **TINY,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def break_off(model, cache, module, count: int) -> None:
    """A step of `count` tokens that ends before this module runs."""
    handle = module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, count), past_key_values=cache)
    handle.remove()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("GptOss", SINKS, id="attention_sink_logits"),
        pytest.param("DiffLlama", TINY, id="differential_attention"),
        pytest.param("Doge", TINY, id="learnt_mask"),
    ],
)
def test_attention_of_another_kind_is_refused_or_right(name, settings):
    """The keys are a Llama's, what attention does with them is not."""
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**settings)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.2)
    ids = tokens(1, 120)
    wanted = logits(model, DynamicCache(config=model.config), ids)
    before = model.config._attn_implementation
    try:
        cache = kvshrink.make_cache(model, METHOD)
    except UnsupportedModelError:
        assert untouched(model, before)
        return
    torch.testing.assert_close(logits(model, cache, ids), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        pytest.param("Gemma3n", "Gemma3nTextConfig", GEMMA3N, id="gemma3n"),
        pytest.param("Gemma4", "Gemma4TextConfig", SHARED, id="gemma4"),
    ],
)
def test_layers_that_share_a_cache_read_what_is_stored(name, config, settings):
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, config)(**settings)).eval()
    ids = torch.randint(3, 90, (1, 70), generator=torch.Generator().manual_seed(0))
    cache, full = kvshrink.make_cache(model, METHOD), DynamicCache(config=model.config)
    for part in (ids, ids[:, :3]):  # the second step reads what the first one stored
        wanted = logits(model, full, part)
        torch.testing.assert_close(logits(model, cache, part), wanted, atol=1e-4, rtol=1e-4)


def test_crop_takes_all_layers_or_none():
    """A sliding layer that records no past cannot go back; then the others must not either."""
    cache = filled(FAMILIES["qwen2_mixed"].build())
    with pytest.raises((KVShrinkError, RuntimeError)):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [60] * 3
    assert cache.table.length == 60


def test_a_step_that_broke_off_behind_a_sliding_layer_is_noticed():
    """Layer 0 slides and has the token, layer 1 is compressed and has not."""
    model = FAMILIES["gemma3"].build()
    cache = filled(model)
    break_off(model, cache, model.model.layers[0].mlp, 1)
    with pytest.raises(KVShrinkError, match="interrupted"):
        model(tokens(1, 1), past_key_values=cache)


def test_a_step_that_broke_off_before_the_first_update_leaves_no_positions():
    """Nothing is cached yet, so the step may be taken again; with another mask its positions are others."""
    model = FAMILIES["llama"].build()
    cache = filled(model)
    break_off(model, cache, model.model.layers[0].self_attn.q_proj, 5)
    mask = torch.ones(1, 65, dtype=torch.long)
    mask[0, 60:63] = 0
    positions = (mask.cumsum(1) - 1)[:, 60:]
    with torch.no_grad():
        model(tokens(1, 5), attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert cache.table.positions[0, 59:].tolist() == [59, -1, -1, -1, 60, 61]


def test_a_cache_cropped_to_nothing_takes_another_batch():
    model = FAMILIES["llama"].build()
    cache, ids = filled(model, rows=3), tokens(1, 120)
    cache.crop(-60)
    logits(model, cache, ids)
    assert cache.table.positions.shape == (1, 120)
