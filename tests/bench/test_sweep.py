"""Some of the types that bench/sweep.py runs, and what else a cache must do for the most used of them."""

import copy
import json

import pytest
import torch

import kvshrink
from kvshrink import RTN, Spectral, data, fit
from kvshrink.errors import CacheError, SettingError
from tests.tiny import BENCH, build, kl_of, lossless, outcome, page

LOSSLESS = RTN(bits=None, window=8)
# the most used; and one of each way in which attention, RoPE or layers differ
TEXT = [
    "gpt_oss", "qwen3_5_text", "qwen3_next", "gemma4_text", "gemma3n_text", "llama4_text", "nemotron_h", "jamba",
    "lfm2", "falcon_h1", "exaone4", "cohere2", "ernie4_5", "hunyuan_v1_dense", "deepseek_v3", "glm4_moe_lite",
    "kimi_linear", "gpt2", "nanochat",
]  # fmt: skip
IMAGES = ["qwen2_5_vl", "qwen3_vl", "mistral3", "gemma4", "llama4", "qwen3_5"]
DEEP = [
    "gpt_oss", "qwen3_5_text", "gemma4_text", "llama4_text", "nemotron_h", "lfm2", "falcon_h1", "exaone4", "ernie4_5",
    "hunyuan_v1_dense", "deepseek_v3", "phi3", "qwen3_moe", "kimi_linear",
]  # fmt: skip
STATES = {"qwen3_5_text", "nemotron_h", "lfm2", "falcon_h1", "kimi_linear"}  # which cannot be taken back


@pytest.mark.parametrize("name", TEXT)
def test_text_models_give_the_tokens_of_dynamic_cache(name):
    found = outcome("text", name)
    assert found["status"] == "identical", found
    assert found["compressed"] > 0


@pytest.mark.parametrize("name", IMAGES)
def test_image_text_models_give_the_tokens_of_dynamic_cache(name):
    assert outcome("image-text", name)["status"] == "identical"


def test_readme_and_page_say_what_was_run():
    found = json.loads(data.path("models.json").read_text())
    counts = [found["counts"][kind]["identical"] for kind in ("text", "image-text")]
    assert f"{counts[0]} text types and {counts[1]} image-text types" in (BENCH.parent / "README.md").read_text()
    assert (BENCH.parent / "docs" / "models.md").read_text() == page(found)
    assert not {r["type"] for r in found["rows"] if r["status"] in ("different", "crashed")}


def ids_of(b: int, s: int) -> torch.Tensor:
    return torch.randint(3, 110, (b, s), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", DEEP)
def test_the_most_used_do_what_llama_does(name, tmp_path):
    """Left pads, beams, a prompt in parts, a second turn, rows taken, save and load: as with DynamicCache."""
    model = build("text", name)
    found = lossless(model, tmp_path)
    assert all(found.values()), found
    _saved_and_forked(model, tmp_path)


def _saved_and_forked(model, folder):
    ids, mask = ids_of(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, :23] = 0
    cache = kvshrink.make_cache(model, LOSSLESS)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.save(folder / "cache.safetensors")
    loaded = kvshrink.make_cache(model, LOSSLESS).load(folder / "cache.safetensors")
    assert loaded.nbytes <= cache.nbytes  # whose sliding layers may be views of more
    more = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)

    def after(cache, rows=slice(None)):
        with torch.no_grad():
            return model(ids[rows, :5], attention_mask=more[rows], past_key_values=cache).logits

    wanted = after(copy.deepcopy(cache))
    torch.testing.assert_close(after(loaded), wanted)
    rows = copy.deepcopy(cache)
    rows.batch_select_indices(torch.tensor([1]))
    alone = after(rows, slice(1, 2))
    torch.testing.assert_close(alone, wanted[1:], atol=1e-4 * float(wanted.abs().max()), rtol=0)
    parts = copy.deepcopy(cache).split()
    torch.testing.assert_close(after(type(cache).join(parts)), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    torch.testing.assert_close(after(cache), wanted)


@pytest.mark.parametrize("name", sorted(STATES - {"lfm2"}))
def test_a_recurrence_says_that_it_cannot_go_back(name):
    model = build("text", name)
    cache = kvshrink.make_cache(model, LOSSLESS)
    with torch.no_grad():
        model(ids_of(1, 80), past_key_values=cache)
        before = copy.deepcopy(cache)
        with pytest.raises(CacheError, match="a layer of this model is a recurrence"):
            cache.crop(-3)
        wanted, got = (model(ids_of(1, 2), past_key_values=c).logits for c in (before, cache))
    assert got.equal(wanted), "a refused crop changed something"
    cache.reset()
    again = kvshrink.make_cache(model, LOSSLESS)
    with torch.no_grad():
        a, b = (model(ids_of(1, 80), past_key_values=c).logits for c in (cache, again))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_text", "nemotron_h", "llama4_text", "falcon_h1", "exaone4"])
def test_spectral_is_fitted_and_near_the_full_cache(name):
    model = build("text", name)
    rows = torch.randint(3, 110, (8, 256), generator=torch.Generator().manual_seed(1))
    artifact = fit(model, Spectral(budget=0.5, window=8), rows, progress=False)
    cache = kvshrink.make_cache(model, artifact)
    assert 0 < kl_of(model, cache) < 0.2
    assert cache.report().byte_ratio < 1


@pytest.mark.parametrize("name", ["hunyuan_v1_dense"])
def test_keys_that_cannot_be_turned_back_are_stored_as_they_are_used(name):
    model = build("text", name)
    rows = torch.randint(3, 110, (8, 256), generator=torch.Generator().manual_seed(1))
    artifact = fit(model, Spectral(budget=0.5, window=8), rows, progress=False)
    with pytest.warns(UserWarning, match="spectral stores keys before RoPE, but those of this model are turned"):
        cache = kvshrink.make_cache(model, artifact)
    assert kl_of(model, cache) < 0.2
    assert kl_of(model, kvshrink.make_cache(model, RTN(bits=4))) < 1


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe_lite", "kimi_linear"])
def test_latents_of_two_widths_are_quantised(name):
    model = build("text", name)
    losses = []
    for bits in (8, 4, 2):
        cache = kvshrink.make_cache(model, RTN(bits=bits, window=8))
        losses.append(kl_of(model, cache))
    assert 0 <= losses[0] < losses[1] < losses[2]
    assert losses[1] < 0.1
    rows = torch.randint(3, 110, (8, 256), generator=torch.Generator().manual_seed(1))
    with pytest.raises(SettingError, match=r"32 and 16 channels .MLA.\. Use a quantiser"):
        fit(model, Spectral(), rows, progress=False)
