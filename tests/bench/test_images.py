"""Image-text models with an image in the prompt: as with DynamicCache, and what shrunken caches lose."""

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN, Spectral, fit
from kvshrink.methods.quant.turboquant import TurboQuant
from tests.tiny import randomise

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
AXES = {**PLAIN, "mrope_section": [2, 3, 3]}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}


def qwen2_5_vl():
    text = {**TEXT, "rope_parameters": AXES, "model_type": "qwen2_5_vl_text"}
    vision = {**VISION, "fullatt_block_indexes": [1], "window_size": 56}
    return hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)


def qwen3_vl():
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**AXES, "mrope_interleaved": True}}
    vision = {**VISION, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(text_config={**text, "model_type": "qwen3_vl_text"}, vision_config=vision, **TOKENS)
    return hf.Qwen3VLForConditionalGeneration, config


def qwen3_5():
    text = {**TEXT, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "model_type": "qwen3_5_text"}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    half = {**PLAIN, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    vision = {**VISION, "num_position_embeddings": 256}
    config = hf.Qwen3_5Config(text_config={**text, "rope_parameters": half}, vision_config=vision, **TOKENS)
    return hf.Qwen3_5ForConditionalGeneration, config


MODELS = {f.__name__: f for f in (qwen2_5_vl, qwen3_vl, qwen3_5)}


def built(name, rows=8, columns=12):
    """(model, what `generate` is given of a prompt with an image of rows * columns / 4 tokens)."""
    cls, config = MODELS[name]()
    torch.manual_seed(0)
    model = cls._from_config(config)
    randomise(model)
    model = model.eval().float().requires_grad_(False)
    model.generation_config.eos_token_id = None
    vision, draw = config.vision_config, torch.Generator().manual_seed(1)
    count = rows * columns // 4
    pixels = torch.randn(4 * count, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=draw)
    text = torch.randint(3, 110, (1, 130), generator=torch.Generator().manual_seed(5))
    image = torch.cat([torch.tensor([[122]]), torch.full((1, count), 120), torch.tensor([[123]])], 1)
    ids = torch.cat([text[:, :20], image, text[:, 20:]], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    given |= {"image_grid_thw": torch.tensor([[1, rows, columns]]), "mm_token_type_ids": (ids == 120).int()}
    return model, given


def answered(model, given, cache):
    more = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        **given, **more, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_in_the_prompt(name):
    model, given = built(name)
    wanted, logits = answered(model, given, None)
    blind, _ = answered(model, {**given, "pixel_values": torch.zeros_like(given["pixel_values"])}, None)
    assert not blind.equal(wanted), "the image does not matter, so nothing is tested"
    cache = kvshrink.make_cache(model, RTN(bits=None, window=8))
    got, own = answered(model, given, cache)
    assert got.equal(wanted)
    torch.testing.assert_close(own, logits, atol=1e-4 * float(logits.abs().max()), rtol=0)
    assert cache.report().held.payload > 0


@pytest.mark.parametrize("name", MODELS)
def test_what_shrunken_caches_lose_with_an_image(name):
    """Keys before RoPE are turned back by one of the axes: consistent, and near the full cache."""
    model, given = built(name)
    rows = torch.randint(3, 110, (8, 256), generator=torch.Generator().manual_seed(1))
    methods = {"turboquant": TurboQuant(bits=4), "spectral": fit(model, Spectral(budget=0.6, window=8), rows)}
    _, logits = answered(model, given, None)
    for label, method in methods.items():
        _, own = answered(model, given, kvshrink.make_cache(model, method))
        p, q = logits[0].log_softmax(-1), own[0].log_softmax(-1)
        first = float((p.exp() * (p - q)).sum(-1).mean())
        assert first < 1e-6, f"{label}: the prompt's own prediction is the exact model's"
        full, cache = DynamicCache(config=model.config), kvshrink.make_cache(model, method)
        with torch.no_grad():
            tail = {"input_ids": torch.randint(3, 110, (1, 20), generator=torch.Generator().manual_seed(9))}
            after = []
            for c in (full, cache):
                model(**given, past_key_values=c)
                after.append(model(**tail, past_key_values=c).logits.log_softmax(-1))
        kl = float((after[0].exp() * (after[0] - after[1])).sum(-1).mean())
        assert 0 < kl < 0.1, f"{label}: {kl}"
