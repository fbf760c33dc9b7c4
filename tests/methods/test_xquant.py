"""XQuant: latents are x U of the projection's SVD; an input comes back from keys and values, and is stored once."""

import dataclasses

import pytest
import torch

from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.lossy import round_trip
from kvshrink.cache.rope import Rope
from kvshrink.errors import SettingError
from kvshrink.methods._packing import Raw
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.xquant import XQuant
from tests.cache.build import feed, make

SHAPE = LayerShape(4, 16, torch.float32)
ROPE = Rope(1e4 ** (-torch.arange(0, 16, 2).float() / 16), 1.0, False)


@pytest.fixture
def layer_of(stats_of):
    """A function from hidden size to (stats, inputs [300, hidden]) of a layer whose keys and values are products."""

    def make_layer(hidden: int, bias: bool = False, norm: bool = False, dtype=torch.float32):
        g = torch.Generator().manual_seed(3)
        x = torch.randn(300, hidden, generator=g) @ torch.randn(hidden, hidden, generator=g) / hidden**0.5
        weights = torch.randn(2, 64, hidden, generator=g) / hidden**0.5
        biases = torch.randn(2, 64, generator=g) * 3 if bias else torch.zeros(2, 64)
        rows = [(x @ w.T + c).to(dtype).float() for w, c in zip(weights, biases, strict=True)]
        if norm:
            rows[0] = torch.nn.functional.normalize(rows[0].unflatten(1, (4, 16)), dim=-1).flatten(1)
        stats = stats_of(SHAPE, *rows, hidden=hidden)
        own = {"key_bias": biases[0], "value_bias": biases[1]} if bias else {}
        return dataclasses.replace(stats, key_weight=weights[0], value_weight=weights[1], **own), x

    return make_layer


def split(rows: torch.Tensor) -> torch.Tensor:
    """[tokens, h d] as [1, h, tokens, d], of whole pages."""
    return rows[:288].unflatten(1, (4, 16)).transpose(0, 1)[None]


@pytest.mark.parametrize("bias", [False, True])
def test_latents_are_the_input_in_the_projection_s_own_basis(layer_of, bias):
    """By another route: U of torch's SVD of W^T and the input itself, up to the sign of each component."""
    stats, x = layer_of(96, bias)
    for codec, weight, rows in zip(
        XQuant(mode="auto").codecs(SHAPE, XQuant().fit_layer(stats)),
        (stats.key_weight, stats.value_weight),
        (stats.sample.keys_pre_rope, stats.sample.values),
        strict=True,
    ):
        wanted = x[:288].double() @ torch.linalg.svd(weight.T.double(), full_matrices=False).U
        got = codec.project(split(rows.flatten(1)))[0, 0].double()
        torch.testing.assert_close(got.abs(), wanted.abs(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(codec.smooth(split(rows.flatten(1))), split(rows.flatten(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_input_comes_back_from_keys_and_values(layer_of, dtype, most, bias):
    stats, x = layer_of(64, bias, dtype=dtype)
    fitted = XQuant(mode="input").fit_layer(stats)
    assert set(fitted) == {"down", "key_weight", "value_weight", "mean"}
    rows = torch.cat([stats.sample.keys_pre_rope.flatten(1), stats.sample.values.flatten(1)], 1)
    found = (rows - fitted["mean"]) @ fitted["down"]
    error = float((found - x).norm() / x.norm())
    assert most / 20 < error < most


def test_one_input_gives_keys_and_values(layer_of):
    """Beside its own arithmetic: the input's 4-bit codes per token, times the weights, keys with RoPE."""
    stats, x = layer_of(64, bias=True)
    method = XQuant(window=32, sinks=0, group=64)
    fitted = method.fit_layer(stats)
    cache, positions = make(method, SHAPE, [fitted]), torch.arange(300)[None]
    rows = [
        r.unflatten(1, (4, 16)).transpose(0, 1)[None]
        for r in (stats.sample.keys_pre_rope.flatten(1), stats.sample.values.flatten(1))
    ]
    feed(cache, [ROPE.apply(rows[0], positions)], [rows[1]], ROPE)
    layer = cache.layers[0]
    new = torch.randn(2, 1, 4, 1, 16)
    keys, values = feed(cache, [new[0]], [new[1]], ROPE)[0]
    got = rebuild(keys._kvshrink, keys, values)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step, low = ((high - low) / 15).half().float(), low.half().float()
    rounded = ((x - low) / step).round().clamp(0, 15) * step + low
    end = keys._kvshrink.first
    assert end == 256
    weights, biases = (stats.key_weight, stats.value_weight), (stats.key_bias, stats.value_bias)
    wanted = [
        (rounded @ w.T + c).unflatten(1, (4, 16)).transpose(0, 1)[None] for w, c in zip(weights, biases, strict=True)
    ]
    wanted[0] = ROPE.apply(wanted[0], positions)
    for a, b in zip(got, wanted, strict=True):
        same = (a[:, :, :end] - b[:, :, :end]).abs().amax((0, 1, 3)) < 1e-3
        assert same.float().mean() > 0.9, "but for numbers between two codes"
    page = 32 * 64 // 2 + 32 * 4
    held = layer.held()
    assert (held.payload, held.metadata) == (8 * 32 * 64 // 2, 8 * 32 * 4)
    assert method.body_bytes(SHAPE, fitted, 8) == 8 * page == method.body_bytes(SHAPE, {}, 8) / 2
    assert layer.held().total == method.layer_bytes(SHAPE, fitted, 301)


def test_a_cache_of_inputs_is_read_alike_by_all_ways(layer_of, monkeypatch):
    """Pads, a cut page, a save: attention by the fused kernel, block by block, and over rebuilt keys."""
    stats, _ = layer_of(64)
    method = XQuant(bits=8)
    fitted = method.fit_layer(stats)
    cache, other = make(method, SHAPE, [fitted]), make(method, SHAPE, [fitted])
    real = torch.ones(2, 241, dtype=torch.bool)
    real[0, :37] = False
    rows = [
        split(r.flatten(1))[:, :, :240].repeat(2, 1, 1, 1) for r in (stats.sample.keys_pre_rope, stats.sample.values)
    ]
    feed(cache, [rows[0]], [rows[1]], ROPE, real[:, :240])
    cache.crop(-70)
    other.load_state_dict(cache.state_dict())
    query, out = torch.randn(2, 8, 1, 16), []
    mask = torch.cat([real[:, :170], real[:, -1:]], 1)[:, None, None]
    for c, reference in ((cache, "0"), (other, "1")):
        monkeypatch.setenv("KVSHRINK_REFERENCE", reference)
        keys, values = feed(c, [rows[0][:, :, :1]], [rows[1][:, :, :1]], ROPE, real[:, -1:])[0]
        out.append(attend(query, keys, values, mask, 0.25, None, keys._kvshrink))
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-4)
    k, v = (x.repeat_interleave(2, 1) for x in rebuild(keys._kvshrink, keys, values))
    scores = (query @ k.transpose(2, 3) * 0.25).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out[0], scores.softmax(-1) @ v, rtol=1e-3, atol=1e-4)
    assert not any(name.startswith("v.") for name in cache.layers[0].pages.records())


def test_a_norm_on_keys_leaves_no_input(layer_of):
    stats, _ = layer_of(64, norm=True)
    assert "key_basis" in XQuant().fit_layer(stats)
    with pytest.raises(SettingError, match="a norm on keys"):
        XQuant(mode="input").fit_layer(stats)
    with pytest.raises(SettingError, match="64 channels made of 96"):
        XQuant(mode="input").fit_layer(layer_of(96)[0])
    for codec in XQuant().codecs(SHAPE, XQuant().fit_layer(stats)):
        rows = split(stats.sample.keys_pre_rope.flatten(1))
        torch.testing.assert_close(codec.smooth(rows), rows, rtol=1e-4, atol=1e-4)


def test_nothing_small_in_a_flat_projection_is_blown_up(layer_of):
    """Two equal rows of W: a singular value of 0, in whose direction 16-bit keys hold their rounding alone."""
    stats, _ = layer_of(96, dtype=torch.bfloat16)
    weight = stats.key_weight.clone()
    weight[5] = weight[4]
    key, _ = XQuant(mode="latent").codecs(
        SHAPE, XQuant(mode="latent").fit_layer(dataclasses.replace(stats, key_weight=weight))
    )
    rows = split(stats.sample.keys_pre_rope.flatten(1))
    rows[:, 0, :, 5] = rows[:, 0, :, 4] * 1.004
    latent = key.project(rows)
    assert latent[..., -1].abs().mean() < latent.abs().mean() * 2
    exact = dataclasses.replace(key, packing=Raw(1, 64, 32, torch.float32))
    torch.testing.assert_close(exact.decode(exact.encode(rows, None), 4), rows, rtol=1e-4, atol=1e-4)


def test_one_side_of_an_input_is_refused(layer_of):
    method = XQuant()
    key, _ = method.codecs(SHAPE, method.fit_layer(layer_of(64)[0]))
    with pytest.raises(SettingError, match="stored as one"):
        round_trip(key, torch.randn(1, 4, 32, 16), None, 32)
