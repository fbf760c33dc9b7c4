"""A cache that holds tokens already: whatever comes next is right, or refused while the next good step still is."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN
from kvshrink.errors import CacheError, UnsupportedModelError
from kvshrink.methods._roles import Method
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from tests.attach.test_masks import LOWEST, METHOD, additive, causal, without
from tests.scenarios.families import reference, subject
from tests.scenarios.scenarios import tokens

T = 100
ONE = tokens(1, 1, seed=5)


def filled(family: str = "llama", method: Method = METHOD, rows: int = 1) -> kvshrink.KVCache:
    cache = kvshrink.make_cache(subject(family), method)
    with torch.no_grad():
        subject(family)(tokens(rows, T), past_key_values=cache)
    return cache


def expected(family: str, ids: Tensor) -> Tensor:
    full = DynamicCache(config=reference(family).config)
    with torch.no_grad():
        reference(family)(tokens(len(ids), T), past_key_values=full)
        return reference(family)(ids, past_key_values=full).logits


def goes_on(cache: kvshrink.KVCache, family: str = "llama") -> None:
    with torch.no_grad():
        got = subject(family)(ONE, past_key_values=cache).logits
    torch.testing.assert_close(got, expected(family, ONE), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "attention weights are never formed"),
        ({"token_type_ids": torch.zeros(1, 1, dtype=torch.long)}, "passes token_type_ids to attention"),
        ({"attention_mask": torch.ones(1, 2, 1, T + 1, dtype=torch.bool)}, "1 or 4 query heads"),
        ({"attention_mask": torch.ones(1, 3, 1, T + 1)}, "1 or 4 query heads"),
    ],
)
def test_what_is_refused_leaves_the_cache_as_it_was(given, message):
    cache = filled()
    with pytest.raises(CacheError, match=message), torch.no_grad():
        subject("llama")(ONE, past_key_values=cache, **given)
    goes_on(cache)


def test_dropped_tokens_and_another_attention():
    cache, model = filled(method=StreamingLLM(window=32)), subject("llama")
    model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(CacheError, match="drops tokens"), torch.no_grad():
            model(ONE, past_key_values=cache)
    finally:
        model.set_attn_implementation("kvshrink")
    other = filled(method=StreamingLLM(window=32))
    with torch.no_grad():
        got, wanted = (model(ONE, past_key_values=c).logits for c in (cache, other))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": reference("llama")}])
def test_assisted_decoding_in_a_second_turn_is_refused(more):
    """It passes the whole text again, which a cache would take for more text."""
    cache = filled()
    text = torch.cat([tokens(1, T), tokens(1, 7, seed=3)], 1)
    with pytest.raises(CacheError, match="the whole text was passed again"):
        subject("llama").generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False, **more)
    goes_on(cache)


def test_arguments_by_place_are_read_as_those_by_name():
    decoder, mask = subject("llama").model, torch.cat([without(slice(0, 40)), torch.ones(2, 1, dtype=torch.long)], 1)
    cache = kvshrink.make_cache(subject("llama"), METHOD)
    with torch.no_grad():
        decoder(tokens(2, T), without(slice(0, 40)), past_key_values=cache)
        with pytest.raises(CacheError, match="shows column 0 of row 0"):
            decoder(tokens(2, 1), torch.ones_like(mask), None, cache)
        with pytest.raises(CacheError, match="holds 2 sequences, the input has 3"):
            decoder(tokens(3, 1), None, None, cache)
        got = decoder(tokens(2, 1), mask, past_key_values=cache).last_hidden_state
        full = DynamicCache(config=reference("llama").config)
        reference("llama").model(tokens(2, T), attention_mask=without(slice(0, 40)), past_key_values=full)
        wanted = reference("llama").model(tokens(2, 1), attention_mask=mask, past_key_values=full).last_hidden_state
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_a_pickled_cache_goes_on_and_is_refused_by_another_model():
    cache = pickle.loads(pickle.dumps(filled()))
    goes_on(cache)
    kvshrink.attach(subject("glm4"))
    with pytest.raises(CacheError, match="made for another model"):
        subject("glm4")(ONE, past_key_values=pickle.loads(pickle.dumps(filled())))


def test_a_sliding_layer_takes_back_only_what_was_recorded():
    cache = filled("gemma3")
    with pytest.raises(CacheError, match="before those tokens come"):
        cache.crop(-5)
    cache.activate_past_recording()
    with pytest.raises(CacheError, match="before those tokens come"):
        cache.crop(-5)
    with torch.no_grad():
        subject("gemma3")(tokens(1, 3, seed=8), past_key_values=cache)
    cache.crop(-3)
    goes_on(cache, "gemma3")


@pytest.mark.parametrize("length", [20, T])
def test_a_model_of_another_dtype_is_refused(length):
    model = type(reference("llama"))(copy.deepcopy(reference("llama").config)).eval()
    cache = kvshrink.make_cache(model, METHOD)
    with torch.no_grad():
        model(tokens(1, length), past_key_values=cache)
        model.to(torch.bfloat16)
        with pytest.raises(CacheError, match=r"made for torch\.float32, the model gives torch\.bfloat16"):
            model(ONE, past_key_values=cache)
        model.to(torch.float32)
        assert torch.isfinite(model(ONE, past_key_values=cache).logits).all()


@pytest.mark.parametrize("low", [LOWEST, -1e9, -65504.0, -1e4])
def test_padding_is_padding_by_whatever_number(low):
    """It takes no sink's place, and counts in no scale."""
    mask = causal(T, T).clone()
    mask[..., :10] = False
    found = []
    for number in (LOWEST, low):
        cache = kvshrink.make_cache(subject("llama"), RTN(bits=2, window=8, sinks=4))
        with torch.no_grad():
            subject("llama")(tokens(1, T), attention_mask=additive(mask, number), past_key_values=cache)
            last = torch.cat([mask[:, :, -1:], torch.ones(1, 1, 1, 1, dtype=torch.bool)], -1)
            logits = subject("llama")(ONE, attention_mask=additive(last, number), past_key_values=cache).logits
        found.append((logits, cache.report().nbytes, cache.compressed[0].sinks.columns.tolist()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    assert found[0][1:] == found[1][1:]


def test_positions_of_the_callers_own_are_not_a_cut_prompt():
    cache = kvshrink.make_cache(subject("llama"), METHOD)
    full = DynamicCache(config=reference("llama").config)
    with torch.no_grad():
        for ids, positions in ((tokens(1, 101), torch.arange(101)[None] // 2), (ONE, torch.tensor([[50]]))):
            got = subject("llama")(ids, position_ids=positions, past_key_values=cache).logits
            wanted = reference("llama")(ids, position_ids=positions, past_key_values=full).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_flash_attention_is_refused_by_name():
    model = type(reference("llama"))(copy.deepcopy(reference("llama").config))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="Load the model with 'sdpa'"):
        kvshrink.attach(model)
