"""longrope (Phi-3, Phi-4): a step beyond the original length turns all its tokens by other frequencies."""

import warnings

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import kvshrink
from kvshrink import CSKV, RTN, Spectral, fit
from kvshrink.cache.lossy import round_trip
from kvshrink.cache.rope import FAR
from kvshrink.errors import CacheError
from tests.cache.build import body_keys
from tests.tiny import randomise

MOST = 150


@pytest.fixture(scope="module")
def model():
    half = 8
    config = hf.Phi3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, original_max_position_embeddings=MOST, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * i for i in range(half)],
            "long_factor": [2.0 + i for i in range(half)], "original_max_position_embeddings": MOST,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config)
    randomise(model)
    return model.eval().float().requires_grad_(False)


def ids_of(count, rows=1, seed=0):
    return torch.randint(3, 97, (rows, count), generator=torch.Generator().manual_seed(seed))


def fed(model, cache, *parts):
    with torch.no_grad():
        return [model(part, past_key_values=cache).logits for part in parts]


def test_both_frequencies_are_seen(model):
    rope = kvshrink.attach(model).layers[0].rope
    assert rope is not None
    assert rope.most == MOST
    assert rope.long is not None
    assert not torch.allclose(rope.long, rope.inv_freq)


@pytest.mark.parametrize("lengths", [(100, 20, 1), (200, 20, 1), (100, 70, 30, 1)], ids=["short", "long", "across"])
def test_keys_come_back_as_their_step_turned_them(model, lengths):
    """Lossless keys before RoPE, in short steps, in long ones, and in both."""
    parts = [ids_of(n, 2, seed=i) for i, n in enumerate(lengths)]
    artifact = fit(model, CSKV(keep=1.0, window=8), ids_of(128, 8, seed=9), progress=False)
    with warnings.catch_warnings(action="error"):
        cache = kvshrink.make_cache(model, artifact)
    assert cache.layers[0].codecs[0].site == "k_pre"
    got, wanted = fed(model, cache, *parts), fed(model, DynamicCache(config=model.config), *parts)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=0)
    ends = [(n, sum(lengths[: i + 1])) for i, n in enumerate(lengths)]
    wanted_marks = [end > MOST for n, end in ends for _ in range(n)]
    assert (cache.table.positions[0] >= FAR).tolist() == wanted_marks
    cache.reset()
    fed(model, cache, parts[0])
    assert bool((cache.table.positions >= FAR).any()) == (lengths[0] > MOST), "a new text begins anew"


@pytest.mark.parametrize("speed", ["accurate", "balanced", "fast"])
def test_spectral_beyond_the_original_length(model, speed):
    method = Spectral(budget=0.6, window=8, speed=speed, allocation="energy")
    artifact = fit(model, method, ids_of(128, 8, seed=9), progress=False)
    parts = [ids_of(n, seed=i) for i, n in enumerate((100, 70, 30, 1))]
    got = fed(model, kvshrink.make_cache(model, artifact), *parts)[-1].log_softmax(-1)
    wanted = fed(model, DynamicCache(config=model.config), *parts)[-1].log_softmax(-1)
    assert 0 < float((wanted.exp() * (wanted - got)).sum(-1).mean()) < 0.05


def test_a_saved_cache_goes_on(model, tmp_path):
    parts = [ids_of(n, seed=i) for i, n in enumerate((100, 70, 30, 5))]
    artifact = fit(model, CSKV(keep=0.8, window=8), ids_of(128, 8, seed=9), progress=False)
    cache = kvshrink.make_cache(model, artifact)
    fed(model, cache, *parts[:3])
    cache.save(tmp_path / "cache")
    other = kvshrink.make_cache(model, artifact).load(tmp_path / "cache")
    assert torch.equal(fed(model, other, parts[3])[0], fed(model, cache, parts[3])[0])


@pytest.mark.parametrize(("held", "prompt"), [(100, 60), (200, 120), (400, 300)])
def test_a_used_cache_and_a_shorter_prompt_are_refused(model, held, prompt):
    cache = kvshrink.make_cache(model, RTN(bits=None, window=8))
    fed(model, cache, ids_of(held))
    with pytest.raises(CacheError, match=f"the cache holds {held} tokens, the prompt has {prompt}"):
        model.generate(ids_of(prompt, seed=4), past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_positions_that_would_look_marked_are_refused(model):
    cache, ids = kvshrink.make_cache(model, RTN(bits=4)), ids_of(5)
    with torch.no_grad(), pytest.raises(CacheError, match=r"position_ids reach 1073741828\. With longrope"):
        model(ids, position_ids=torch.arange(FAR, FAR + 5)[None], past_key_values=cache)


@pytest.mark.parametrize("length", [140, 300])
@pytest.mark.parametrize("speed", ["accurate", "fast"])
def test_a_simulated_loss_is_a_real_caches(model, length, speed):
    """Rows that one step turned, within the original length and beyond it: the same error as in a cache's pages."""
    method = Spectral(budget=0.4, window=8, sinks=0, speed=speed, allocation="energy", window_bits=None)
    artifact = fit(model, method, ids_of(128, 8, seed=9), progress=False)
    full, cache = DynamicCache(config=model.config), kvshrink.make_cache(model, artifact)
    fed(model, full, ids_of(length))
    fed(model, cache, ids_of(length))
    layer, rope = cache.layers[0], kvshrink.attach(model).layers[0].rope
    stored = body_keys(layer.snapshot(rope))
    exact = full.layers[0].keys
    simulated = round_trip(layer.codecs[0], exact, rope, layer.method.page)[:, :, : stored.shape[2]]
    torch.testing.assert_close(simulated, stored, atol=1e-4, rtol=0)


def test_generate_is_as_with_the_full_cache(model):
    ids = ids_of(120)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(ids, **given)
    assert model.generate(ids, past_key_values=kvshrink.make_cache(model, RTN(bits=None, window=8)), **given).equal(
        wanted
    )
