"""XQuant-CL: a second layer is its difference from what the first one's pages say."""

import copy
import dataclasses

import pytest
import torch

from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.xquant import XQuant
from kvshrink.methods.quant.xquant_cl import XQuantCL
from kvshrink.store.tokens import TokenTable
from tests.cache.build import feed

SHAPE = LayerShape(4, 16, torch.float32)
ROPE = Rope(1e4 ** (-torch.arange(0, 16, 2).float() / 16), 1.0, False)
TOKENS = 300


@pytest.fixture
def layers_of(stats_of):
    """A function from hidden size to (stats, inputs [300, hidden]) of two layers, whose inputs are alike."""

    def make_layers(hidden: int):
        g = torch.Generator().manual_seed(5)
        x = torch.randn(TOKENS, hidden, generator=g)
        found = []
        for _ in range(2):
            weights = torch.randn(2, 64, hidden, generator=g) / hidden**0.5
            stats = stats_of(SHAPE, *(x @ w.T for w in weights), hidden=hidden)
            found.append((dataclasses.replace(stats, key_weight=weights[0], value_weight=weights[1]), x))
            x = x + 0.1 * torch.randn(TOKENS, hidden, generator=g)
        return found

    return make_layers


def fitted(method: XQuantCL, layers) -> dict:
    found, record = method.finish(
        {i: method.fit_layer(f) for i, (f, _) in enumerate(layers)}, {0: SHAPE, 1: SHAPE}, None
    )
    assert record == {"pairs": [[0, 1]]}
    assert [method.stores_delta(found[i]) for i in (0, 1)] == [False, True]
    assert not any(name.endswith("rows") for tensors in found.values() for name in tensors)
    return found


def cache_of(method: XQuantCL, found: dict) -> KVCache:
    table = TokenTable()
    first = CompressedLayer(method, SHAPE, method.tiers(SHAPE, found[0]), table)
    second = CompressedLayer(method, SHAPE, method.tiers(SHAPE, found[1]), table, base=first)
    return KVCache([first, second], method, table, "model", "fitted")


def rows(layers, at: slice, b: int = 1) -> tuple[list, list]:
    """Keys after RoPE and values of both layers."""
    positions = torch.arange(TOKENS)[None, at]
    keys = [
        ROPE.apply(f.sample.keys_pre_rope[at].transpose(0, 1)[None], positions).repeat(b, 1, 1, 1) for f, _ in layers
    ]
    return keys, [f.sample.values[at].transpose(0, 1)[None].repeat(b, 1, 1, 1) for f, _ in layers]


def coded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Affine codes per token."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def test_a_second_input_is_its_difference_from_the_first_rounded_one(layers_of):
    """Beside its own arithmetic."""
    layers, method = layers_of(64), XQuantCL(sinks=0, group=64)
    cache = cache_of(method, fitted(method, layers))
    feed(cache, *rows(layers, slice(None)), ROPE)
    keys, values = feed(cache, *rows(layers, slice(0, 1)), ROPE)[1]
    handle = keys._kvshrink
    got = rebuild(handle, keys, values)[1][0, :, : handle.first].transpose(0, 1).flatten(1)
    (_, one), (stats, two) = layers
    first = coded(one, 4)
    wanted = (first + coded(two - first, 2)) @ stats.value_weight.T
    same = (got - wanted[: handle.first]).abs().amax(1) < 1e-3
    assert same.float().mean() > 0.9, "but for numbers between two codes"


@pytest.mark.parametrize(("hidden", "share"), [(64, 0.5), (96, 0.6)])
def test_a_difference_loses_less_than_the_same_bits_by_themselves(layers_of, hidden, share):
    """Inputs (64), and latents (96), of which a third lies in directions that the other layer's do not know."""
    layers, errors = layers_of(hidden), []
    for method in (XQuantCL(sinks=0), XQuantCL(sinks=0, bits=2)):
        found = fitted(method, layers)
        if method.bits == 2:
            found[1] = XQuant(bits=2).fit_layer(layers[1][0])
        cache = cache_of(method, found)
        cache.layers[1].base = cache.layers[0] if method.bits == 4 else None
        keys, values = rows(layers, slice(None))
        feed(cache, keys, values, ROPE)
        layer = cache.layers[1]
        k, v = feed(cache, *rows(layers, slice(0, 1)), ROPE)[1]
        end = k._kvshrink.first
        errors.append(float((rebuild(k._kvshrink, k, v)[0][:, :, :end] - keys[1][:, :, :end]).norm()))
        assert layer.held().payload == len(layer.body) * 32 * (1 if hidden == 64 else 2) * 64 * 2 // 8
    assert errors[0] < errors[1] * share


@pytest.mark.parametrize("hidden", [64, 96])
def test_pairs_live_through_whatever_a_cache_does(layers_of, hidden):
    """Pads, turns, a crop into a page, a copy, a save: attention over pages is attention over rebuilt keys, and equals
    that of a cache that was fed token by token."""
    layers, method = layers_of(hidden), XQuantCL(window=8)
    found = fitted(method, layers)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[0, :37] = False
    caches = []
    for size in (150, 7):
        cache, at = cache_of(method, found), 0
        while at < 250:
            part = slice(at, min(at + size, 250))
            feed(cache, *rows(layers, part, 2), ROPE, real[:, part])
            at = part.stop
        caches.append(cache)
    caches.append(copy.deepcopy(caches[0]))
    assert caches[2].layers[1].base is caches[2].layers[0] is not caches[0].layers[0]
    caches.append(cache_of(method, found).load_state_dict(caches[0].state_dict()))
    out, query = [], torch.randn(2, 8, 2, 16)
    for cache in caches:
        cache.crop(-93)
        feed(cache, *rows(layers, slice(157, 230), 2), ROPE, real[:, 157:230])
        keys, values = feed(cache, *rows(layers, slice(230, 232), 2), ROPE, real[:, 230:232])[1]
        mask = torch.ones(2, 232, dtype=torch.bool).tril(230) & real[:, None, None, :232]
        out.append(attend(query, keys, values, mask, 0.25, None, keys._kvshrink))
        k, v = (x.repeat_interleave(2, 1) for x in rebuild(keys._kvshrink, keys, values))
        scores = (query @ k.transpose(2, 3) * 0.25).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(out[-1], scores.softmax(-1) @ v, rtol=1e-3, atol=1e-4)
    for other in out[1:]:
        torch.testing.assert_close(other, out[0], rtol=1e-3, atol=1e-3)


def test_a_pair_holds_what_is_promised(layers_of):
    layers, method = layers_of(64), XQuantCL()
    found = fitted(method, layers)
    cache = cache_of(method, found)
    feed(cache, *rows(layers, slice(None)), ROPE)
    for i, bits in enumerate((4, 2)):
        held = cache.layers[i].held().total
        assert held == method.layer_bytes(SHAPE, found[i], TOKENS)
        assert method.bits_per_token(SHAPE, found[i]) == 64 * bits + 32
    assert XQuantCL(mode="input").bits_per_token(SHAPE, {}) == 64 * 3 + 32


def test_layers_that_are_not_alike_are_no_pair(layers_of):
    method = XQuantCL()
    inputs, latents = method.fit_layer(layers_of(64)[0][0]), method.fit_layer(layers_of(96)[0][0])
    found, record = method.finish({0: inputs, 1: latents, 2: inputs}, dict.fromkeys(range(3), SHAPE), None)
    assert record == {"pairs": []}
    assert not any(method.stores_delta(tensors) for tensors in found.values())
