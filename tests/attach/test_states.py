"""Layers with a state: interrupted steps, rows after a reset, inference mode, forks, convolutions that go back."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN
from kvshrink.cache.state import PLAIN
from kvshrink.errors import ArtifactError, CacheError
from kvshrink.store.digest import digest
from tests.tiny import build

LOSSLESS = RTN(bits=None, window=8)
STATES = ["qwen3_5_text", "lfm2", "falcon_h1", "nemotron_h"]


def ids_of(b, s, seed=7):
    return torch.randint(3, 110, (b, s), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, cache, ids, **given):
    return model(ids, past_key_values=cache, **given).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("name", STATES)
def test_a_step_that_broke_off_is_refused(name):
    """A state has moved on, and does not say so."""
    model = build("text", name)
    cache = kvshrink.make_cache(model, LOSSLESS)
    read(model, cache, ids_of(1, 80))
    with pytest.raises(CacheError, match="bonus"):
        read(model, cache, ids_of(1, 1), bonus=3)
    with pytest.raises(CacheError, match=r"interrupted.*reset\(\)"):
        read(model, cache, ids_of(1, 1))
    cache.reset()
    close(read(model, cache, ids_of(1, 60)), read(model, DynamicCache(config=model.config), ids_of(1, 60)))


@pytest.mark.parametrize("name", STATES)
def test_after_a_reset_any_number_of_rows(name, tmp_path):
    model = build("text", name)
    cache = kvshrink.make_cache(model, LOSSLESS)
    read(model, cache, ids_of(2, 80))
    cache.reset()
    assert cache.rows == 0
    cache.save(tmp_path / "empty.safetensors")
    cache.load(tmp_path / "empty.safetensors")
    close(read(model, cache, ids_of(1, 60)), read(model, DynamicCache(config=model.config), ids_of(1, 60)))


@pytest.mark.parametrize("name", STATES)
def test_a_prompt_in_inference_mode_is_continued_outside(name):
    model = build("text", name)
    cache, full = kvshrink.make_cache(model, LOSSLESS), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids_of(1, 80), past_key_values=cache)
    read(model, full, ids_of(1, 80))
    close(read(model, cache, ids_of(1, 2)), read(model, full, ids_of(1, 2)))


@pytest.mark.parametrize("name", STATES)
def test_what_was_taken_out_stays_as_it_was(name):
    model = build("text", name)
    cache = kvshrink.make_cache(model, LOSSLESS)
    read(model, cache, ids_of(1, 80))
    state, fork = cache.state_dict(), copy.deepcopy(cache)
    wanted = read(model, cache, ids_of(1, 3, 2))
    close(read(model, fork, ids_of(1, 3, 2)), wanted)
    close(read(model, kvshrink.make_cache(model, LOSSLESS).load_state_dict(state), ids_of(1, 3, 2)), wanted)


def test_a_saved_cache_without_its_states_is_refused():
    import json

    model = build("text", "qwen3_5_text")
    cache = kvshrink.make_cache(model, LOSSLESS)
    read(model, cache, ids_of(1, 80))
    state = {k: t for k, t in cache.state_dict().items() if ".states." not in k}
    plain = json.loads(state[PLAIN].numpy().tobytes())
    plain.pop("sha256")
    for layer in plain["layers"]:
        if "states" in layer:
            layer["states"] = {}
    text = json.dumps({**plain, "sha256": digest(plain, {k: t for k, t in state.items() if k != PLAIN})})
    state[PLAIN] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with pytest.raises(ArtifactError, match="states"):
        kvshrink.make_cache(model, LOSSLESS).load_state_dict(state)


def test_convolutions_go_back_as_far_as_they_recorded():
    model = build("text", "lfm2")
    cache = kvshrink.make_cache(model, LOSSLESS)
    read(model, cache, ids_of(1, 60))
    with pytest.raises(CacheError, match=r"activate_past_recording\(\) before"):
        cache.crop(-2)
    cache = kvshrink.make_cache(model, LOSSLESS)
    cache.activate_past_recording()
    read(model, cache, ids_of(1, 60))
    cache.crop(0)
    read(model, cache, ids_of(1, 3, 5))
    with pytest.raises(CacheError, match="cannot crop 5 tokens"):
        cache.crop(-5)
    cache.crop(-3)
    full = DynamicCache(config=model.config)
    read(model, full, ids_of(1, 60))
    close(read(model, cache, ids_of(1, 2, 3)), read(model, full, ids_of(1, 2, 3)))


def test_a_short_prompt_that_is_recorded_is_saved(tmp_path):
    model = build("text", "lfm2")
    cache, full = kvshrink.make_cache(model, LOSSLESS), DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, cache, ids_of(1, 1))
    read(model, full, ids_of(1, 1))
    cache.save(tmp_path / "c.safetensors")
    loaded = kvshrink.make_cache(model, LOSSLESS).load(tmp_path / "c.safetensors")
    close(read(model, loaded, ids_of(1, 4)), read(model, full, ids_of(1, 4)))
