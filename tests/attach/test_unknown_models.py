"""Models that look like known ones and are not: each is right, or refused with the reason, in any dtype."""

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN
from kvshrink.attach.keywords import HARMLESS, check_keywords, plain
from kvshrink.errors import CacheError, UnsupportedModelError
from tests.attach.test_attach import TINY, logits, untouched
from tests.attach.test_wrong_tokens import SHARED, SINKS
from tests.scenarios.families import FAMILIES
from tests.scenarios.scenarios import tokens

METHOD = RTN(bits=None, window=8)
MISTRAL = {"model_type": "mistral", **TINY, "head_dim": 8, "sliding_window": None}
PIXTRAL = {**TINY, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, "head_dim": 8}
SLIDING = {**TINY, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
VALUES = {**SHARED, "num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
QWEN = {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}


def built(name: str, config, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """With weights that are drawn, sinks too."""
    torch.manual_seed(1)
    model = getattr(hf, name)(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * (1 if weight.dim() == 1 else weight.shape[-1] ** -0.5))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.01, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("name", ["GptOss", "GraniteSWA", "GraniteMoeSWA"])
def test_sinks_as_logits_take_their_share(name, strength, dtype):
    """In bfloat16 too, where 3 were once accepted and ignored."""
    settings = SINKS if name == "GptOss" else {**SINKS, "sliding_window": 16}
    model = built(f"{name}ForCausalLM", getattr(hf, f"{name}Config")(**settings), dtype)
    for each, weight in model.named_parameters():
        if each.endswith("sinks"):
            weight.copy_(torch.randn_like(weight) * strength)
    wanted, got = (torch.stack(answered(model, cache)) for cache in (None, kvshrink.make_cache(model, METHOD)))
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)
    for each, weight in model.named_parameters():
        if each.endswith("sinks"):
            weight.fill_(-1e4)
    without = torch.stack(answered(model, None))
    assert strength < 1 or float((without - wanted).abs().max()) > 0.003 * float(wanted.abs().max()), (
        "nothing is tested"
    )


def answered(model, cache) -> tuple:
    """Logits of some tokens after a prompt."""
    ids = tokens(1, 120)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(ids, **settings, **given)
    assert cache is None or cache.report().held.payload > 0
    return tuple(x.float() for x in out.logits)


def test_what_bfloat16_rounds_away_is_seen():
    """A layer that scales its queries by 1.003: far below bfloat16's steps, and no layer of this family."""

    model = FAMILIES["llama"].build().to(torch.bfloat16)
    attention = model.model.layers[1].self_attn
    real = type(attention).forward

    class Alike(type(attention)):
        def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
            if past_key_values is not None:
                hidden_states = hidden_states * 1.003
            return real(self, hidden_states, *args, past_key_values=past_key_values, **kwargs)

    attention.__class__ = Alike
    with pytest.raises(UnsupportedModelError, match=r"of layer 1 could not be recomputed \(relative error 0\.00"):
        kvshrink.make_cache(model, METHOD)
    assert untouched(model)


RIGHT_OR_REFUSED = {
    "values_are_keys": ("Gemma4ForCausalLM", lambda: hf.Gemma4TextConfig(**VALUES), None),
    "shared_keys": ("Gemma4ForCausalLM", lambda: hf.Gemma4TextConfig(**SHARED), None),
    "norm_without_weight": ("NanoChatForCausalLM", lambda: hf.NanoChatConfig(**TINY), None),
    "rope_on_some": ("Cohere2ForCausalLM", lambda: hf.Cohere2Config(**SLIDING), None),
    "cross_attention": (
        "MllamaForCausalLM",
        lambda: hf.models.mllama.configuration_mllama.MllamaTextConfig(**TINY, cross_attention_layers=[1]),
        "cross-attention",
    ),
    "rope_of_one_kind": ("BeamForCausalLM", lambda: hf.BeamConfig(**SLIDING), None),
    "three_axes": (
        "Qwen2VLForConditionalGeneration",
        lambda: hf.Qwen2VLConfig(text_config=QWEN, vision_config={"depth": 1, "embed_dim": 32, "num_heads": 4}),
        None,
    ),
    "beside_a_vision_tower": (
        "Mistral3ForConditionalGeneration",
        lambda: hf.Mistral3Config(text_config=MISTRAL, vision_config=PIXTRAL),
        None,
    ),
}


@pytest.mark.parametrize("kind", RIGHT_OR_REFUSED)
def test_odd_models_are_right_or_refused_with_the_reason(kind):
    name, config, reason = RIGHT_OR_REFUSED[kind]
    model = built(name, config())
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            kvshrink.make_cache(model, METHOD)
        return
    wanted, got = (torch.stack(answered(model, cache)) for cache in (None, kvshrink.make_cache(model, METHOD)))
    torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_any_failure_of_inspection_is_a_refusal():
    model = FAMILIES["llama"].build()
    del model.model.layers[1].self_attn.config
    with pytest.raises(UnsupportedModelError, match=r"llama: .*AttributeError.*config.* unknown kind") as error:
        kvshrink.make_cache(model, METHOD)
    assert isinstance(error.value.__cause__, AttributeError)
    assert "\n" not in str(error.value)
    model = FAMILIES["llama"].build()
    model.model.layers[0].self_attn.layer_idx = None
    with pytest.raises(UnsupportedModelError, match="layer 0 has 0 attention modules"):
        kvshrink.make_cache(model, METHOD)


def test_keywords_are_known_or_refused_at_each_call():
    model, ids = FAMILIES["llama"].build(), tokens(1, 80)
    cache = kvshrink.make_cache(model, METHOD)
    logits(model, cache, ids)
    known = dict.fromkeys(HARMLESS - {"position_ids", "use_cache", "return_dict"}, False)
    known |= {"sliding_window": 8, "is_causal": True, "s_aux": None, "position_bias": None, "output_attentions": False}
    assert plain(known)
    for name, value in {"s_aux": torch.ones(4), "position_bias": torch.ones(1), "is_causal": False, "new": 0}.items():
        with pytest.raises(CacheError, match=f"Attention passes {name} to attention, which is not known"):
            check_keywords({**known, name: value}, "Attention", by_module=False)
    with pytest.raises(CacheError, match="LlamaAttention passes seq_idx to attention"):
        model(ids[:, :1], past_key_values=cache, seq_idx=torch.zeros(1, 1))
    full = DynamicCache(config=model.config)
    wanted = logits(model, full, ids)
    torch.testing.assert_close(logits(model, DynamicCache(config=model.config), ids, seq_idx=1), wanted)
