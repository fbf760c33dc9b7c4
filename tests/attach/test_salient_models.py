"""A method that ranks tokens, on models: its queries, its choice, and that nobody else pays for them."""

from dataclasses import dataclass
from typing import final

import pytest
import torch
from transformers import DynamicCache

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.attach import attention, stage
from kvshrink.cache import layer as layer_file
from kvshrink.cache.scoring import received
from kvshrink.kernels.pack import unpack
from kvshrink.methods._packing import Packing, Raw, Salient
from kvshrink.methods._policy import probes
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods.quant.edgeqat import EdgeQAT
from kvshrink.methods.quant.mikv import MiKV
from kvshrink.methods.quant.zipcache import ZipCache
from tests.scenarios.families import FAMILIES, reference, subject
from tests.scenarios.scenarios import SCENARIOS, feed, generate, padded_tokens, tokens


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "phi3_partial", "gemma2", "olmo2", "qwen3", "glm4", "smollm3"])
def test_queries_are_those_that_the_model_s_attention_uses(name, monkeypatch):
    """Of every family's kind of projection, norm, RoPE, scale and soft cap."""
    model, used, asked = FAMILIES[name].build(), [], []

    def dense(module, query, key, value, mask, scaling, dropout, softcap, kwargs):
        used.append((query * scaling, softcap))
        return real_dense(module, query, key, value, mask, scaling, dropout, softcap, kwargs)

    def noted(given, *rest):
        asked.append(given)
        return received(given, *rest)

    cache, real_dense = kvshrink.make_cache(model, EdgeQAT(window=8)), attention._dense
    monkeypatch.setattr(attention, "_dense", dense)
    monkeypatch.setattr("kvshrink.cache.writing.received", noted)
    feed(model, tokens(2, 100), cache)
    sliding = {i for i, layer in enumerate(cache.layers) if not isinstance(layer, layer_file.CompressedLayer)}
    used = [u for i, u in enumerate(used) if i not in sliding]
    assert len(asked) == len(used) == FAMILIES[name].compressed
    for given, (query, softcap) in zip(asked, used, strict=True):
        assert torch.equal(given.rows, probes(100))
        assert given.softcap == softcap
        torch.testing.assert_close(given.queries, query[:, :, given.rows], rtol=1e-4, atol=1e-5)


def test_no_query_is_projected_that_nobody_asks_for(monkeypatch):
    """Not for a method that does not care, nor in a step after which nothing leaves the window."""
    model, calls, real = FAMILIES["llama"].build(), [], stage.ask

    def spy(module, given, **how):
        calls.append(given["hidden_states"].shape[1])
        return real(module, given, **how)

    monkeypatch.setattr(stage, "ask", spy)
    for method, wanted in ((RTN(window=8), []), (EdgeQAT(window=8), [10, 10, 1, 1, 1, 1, 1, 1])):
        cache = kvshrink.make_cache(model, method)
        feed(model, tokens(1, 100)[:, :39], cache)
        assert calls == [], "the first page leaves with token 40"
        cache = kvshrink.make_cache(model, method)
        generate(model, tokens(1, 100), cache, max_new_tokens=70)
        assert calls == wanted, "a prompt's probes; then the one query after which a page leaves; of two layers"
        assert all(layer.staged is None for layer in cache.layers)


PLANTED = 5  # a token whose keys all queries of `planted` look for


def planted():
    """Qwen2 of one layer: every query asks for a slow channel that only PLANTED's keys have."""
    model = FAMILIES["qwen2"].build()
    attention, embedding = model.model.layers[0].self_attn, model.model.embed_tokens.weight
    wanted = torch.zeros(32)
    wanted[0] = 1.0
    embedding[:, 0] = 0.0
    embedding[PLANTED] = wanted * 3
    for projection, bias in ((attention.k_proj, 0.0), (attention.q_proj, 6.0)):
        rows = slice(3, None, 8)  # RoPE hardly turns the last pair of a head's 8 channels
        projection.weight[rows] = wanted if projection is attention.k_proj else 0.0
        projection.bias[rows] = bias
    return model


@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_planted_token_has_more_bits_than_its_page(pads, sinks):
    model = planted()
    ids, mask = padded_tokens(0, pads)
    ids = ids.where(ids != PLANTED, PLANTED + 1)
    at = torch.tensor([30, 61])
    ids[:, at] = PLANTED
    cache = kvshrink.make_cache(model, EdgeQAT(window=8, sinks=sinks, share=0.25))
    feed(model, ids, cache, mask=mask)
    layer = cache.layers[0]
    first = int(layer.pages.first[0, 0])
    for kv in "kv":
        chosen = masks(layer, kv).flatten(2)
        assert chosen.shape == (2, 2, 64)
        assert chosen[:, :, at - first].all()
        assert chosen.sum() == 2 * 2 * 2 * 8
        real = mask[:, first : first + 64] > 0
        assert not (chosen & ~real[:, None]).any(), "a pad has no bits to win"
    wanted = exact(model, ids, mask)[:, :, first : first + 64]
    keys = layer.codecs[0].decode(layer.pages.records(0, 2).under("k."), 2)
    error = (keys - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert error[:, :, at - first].max() < 1e-4 < error.max()


def exact(model, ids, mask) -> torch.Tensor:
    full = DynamicCache(config=model.config)
    feed(model, ids, full, mask=mask)
    return full.layers[0].keys


@pytest.mark.parametrize("method", [ZipCache(window=8), EdgeQAT(window=8)])
def test_crop_reorder_and_a_file_leave_pages_as_they_are(method, tmp_path):
    model = FAMILIES["llama"].build()
    cache = kvshrink.make_cache(model, method)
    feed(model, tokens(2, 200), cache)
    before = {k: t.clone() for k, t in cache.layers[0].pages.records().items()}
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "cache.safetensors")
    cache = kvshrink.make_cache(model, method).load(tmp_path / "cache.safetensors")
    cache.crop(-80)  # into a page
    assert (cache.layers[0].pages.used[..., -1] < method.page).all()
    cut = len(cache.layers[0].pages)
    out = generate(model, tokens(2, 200).flip(0)[:, :140], cache, max_new_tokens=60)
    assert out.shape == (2, 200)
    for name, tensor in before.items():
        kept = cache.layers[0].pages.records(0, cut)[name]
        assert torch.equal(kept, tensor.flip(0)[:, :cut])


@pytest.mark.parametrize("method", [MiKV(window=8), CSKV(keep=0.5, codec="zipcache", window=8)])
def test_a_fitted_method_is_told_the_importance_of_tokens(method):
    """Untold, it would give the first tokens of each page more bits."""
    model = subject("llama")
    fitted = kvshrink.fit(model, method, tokens(4, 128, seed=99), batch=4, progress=False)
    cache = kvshrink.make_cache(model, fitted)
    out = generate(model, tokens(2, 100), cache, max_new_tokens=60)
    assert out.shape == (2, 160)
    for layer in cache.layers:
        for kv in "kv":
            chosen = masks(layer, kv)
            count = int(chosen[0, 0, 0].sum())
            assert (chosen.sum(-1) == count).all()
            assert chosen.shape[2] == 4, "two pages of the prompt, two of tokens that came one by one"
            assert not chosen[..., :count].flatten(0, 1).all(-1).any(), "not just the first ones"


@final
@dataclass(frozen=True)
class Sorted(Quantiser):
    """Loses nothing, but puts tokens in the order of their importance."""

    window: int = 8

    def packing(self, kv: str, space: Space, learnt: dict) -> Packing:
        parts = (Raw(1, space.width, tokens, space.dtype) for tokens in (8, 24))
        return Salient(space.groups, space.width, *parts)


Sorted.__module__ = "kvshrink.methods.quant.sorted"  # a method is called by its file


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_tokens_in_order_of_worth_are_read_as_if_nothing_had_moved(family, scenario):
    model = reference(family)
    wanted = scenario(model, lambda: DynamicCache(config=model.config))
    got = scenario(subject(family), lambda: kvshrink.make_cache(subject(family), Sorted()))
    assert len(got) == len(wanted)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def masks(layer, kv: str) -> torch.Tensor:
    """Which tokens of the body have more bits, bool [b, G, p, page]."""
    return unpack(layer.pages.records()[f"{kv}.mask"].transpose(1, 2), 1).bool()
