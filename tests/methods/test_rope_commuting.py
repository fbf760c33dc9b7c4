"""Golden sources: complex SVD per frequency in numpy, and dense attention over the keys as the model makes them."""

import numpy as np
import pytest
import torch

import kvshrink
from kvshrink.attach.look import layers_of
from kvshrink.cache import attend as attend_module
from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.rope import Rope
from kvshrink.errors import SettingError
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.rope_commuting import RopeCommuting
from tests.cache.build import feed, make
from tests.scenarios.families import FAMILIES

SHAPE = LayerShape(4, 8, torch.float32)
ROPES = {
    "half": Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), 1.0, False),
    "interleaved": Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), 1.0, True),
    "partial": Rope(torch.tensor([1.0, 0.2]), 1.0, False),
    "partial interleaved": Rope(torch.tensor([1.0, 0.2, 0.1]), 1.3, True),
    "none": None,
}


@pytest.fixture(params=ROPES)
def rope(request):
    return ROPES[request.param]


@pytest.fixture
def rows():
    """Keys before RoPE [t, n]: heads that vary together, and a mean."""
    return torch.randn(320, 32) @ torch.randn(32, 32) + 2 * torch.randn(32)


def by_head(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(1, (SHAPE.heads, -1)).transpose(0, 1)[None].contiguous()


def rotated(keys: torch.Tensor, rope: Rope | None, first: int = 0) -> torch.Tensor:
    positions = torch.arange(first, first + keys.shape[2])[None]
    return keys if rope is None else rope.apply(keys, positions)


def pairs(rope: Rope | None):
    return None if rope is None else rope.pairs()


def key_codec(keep: float, stats) -> BasisCodec:
    method = RopeCommuting(keep=keep)
    return method.codecs(SHAPE, method.fit_layer(stats))[0]


def component_gains(rows: torch.Tensor, rope: Rope | None) -> list[float]:
    """Energy of each kept unit of two channels, by SVD: complex over the heads of a frequency, real for the rest."""
    x = rows.double().numpy().reshape(len(rows), SHAPE.heads, -1)
    gains, still = [], list(range(x.shape[2]))
    if rope is not None:
        for a, b in zip(*(p.tolist() for p in rope.pairs()), strict=True):
            gains += (np.linalg.svd(x[:, :, a] + 1j * x[:, :, b], compute_uv=False) ** 2).tolist()
            still = [c for c in still if c not in (a, b)]
    if still:
        energy = np.linalg.svd(x[:, :, still].reshape(len(x), -1), compute_uv=False) ** 2
        gains += (energy[0::2] + energy[1::2]).tolist()
    return sorted(gains, reverse=True)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
def test_the_error_is_the_energy_of_the_dropped_components(stats_of, rows, rope, keep):
    """And it is the same after RoPE as before, at whatever position (YaRN's factor of 1.3 scales it)."""
    codec = key_codec(keep, stats_of(SHAPE, keys=rows, pairs=pairs(rope)))
    gains, kept = component_gains(rows, rope), int(keep * 32) // 2
    keys = rotated(by_head(rows), rope, 1000)
    lost = (codec.decode(codec.encode(keys, None), 4) - keys).double()
    if rope is not None and rope.scaling != 1.0:
        lost = rope.undo(lost.float(), torch.arange(1000, 1320)[None])
    torch.testing.assert_close(float(lost.square().sum()), sum(gains[kept:]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["half", "interleaved"])
def test_encoding_commutes_with_rope(stats_of, rows, name):
    """The latent of a rotated key is the latent, rotated: one complex number per component, by its own frequency."""
    rope = ROPES[name]
    codec = key_codec(0.5, stats_of(SHAPE, keys=rows, pairs=rope.pairs()))
    keys = by_head(rows)
    plain, moved = (codec.unpack(codec.encode(k, None))[0, 0] for k in (keys, rotated(keys, rope, 7)))
    complex_ = [torch.complex(z[:, 0::2], z[:, 1::2]) for z in (plain, moved)]
    weight = codec.up[0].unflatten(-1, (4, 8)).abs().sum(1)[0::2]  # [component, channel]
    frequency = weight[:, rope.pairs()[0]].add(weight[:, rope.pairs()[1]]).argmax(1)
    angle = torch.arange(7, 327)[:, None] * rope.inv_freq[frequency]
    torch.testing.assert_close(complex_[1], complex_[0] * torch.polar(torch.ones_like(angle), angle), atol=1e-3, rtol=0)


def test_a_component_stays_within_one_frequency(stats_of, rope, rows):
    codec = key_codec(1.0, stats_of(SHAPE, keys=rows, pairs=pairs(rope)))
    up = codec.up[0]
    torch.testing.assert_close(up @ up.T, torch.eye(32), atol=1e-5, rtol=0)
    weight = up.unflatten(-1, (4, 8)).abs().sum(1)  # [row, channel]
    groups = [] if rope is None else [set(p) for p in zip(*(x.tolist() for x in rope.pairs()), strict=True)]
    groups.append(set(range(8)).difference(*groups))
    for row in weight:
        used = set(row.gt(1e-6).nonzero().flatten().tolist())
        assert sum(bool(used & group) for group in groups) == 1


@pytest.mark.parametrize("bits", [None, 4])
def test_absorbed_queries_score_as_rebuilt_keys_do(stats_of, rows, rope, bits):
    method = RopeCommuting(keep=0.5, bits=bits)
    codec, value_codec = method.codecs(SHAPE, method.fit_layer(stats_of(SHAPE, keys=rows, pairs=pairs(rope))))
    stored, query = codec.encode(rotated(by_head(rows), rope), None), torch.randn(1, 4, 6, 8)
    scores = codec.absorb(query) @ codec.unpack(stored).transpose(2, 3)
    torch.testing.assert_close(scores, query @ codec.decode(stored, 4).transpose(2, 3), atol=1e-3, rtol=1e-4)
    assert value_codec.absorb(query) is None


@pytest.mark.parametrize("s", [1, 3])
def test_attention_is_exact_at_full_rank_and_rebuilds_no_key(stats_of, rows, rope, s, monkeypatch):
    method = RopeCommuting(keep=1.0, window=8)
    cache = make(method, SHAPE, [method.fit_layer(stats_of(SHAPE, keys=rows, pairs=pairs(rope)))])
    keys, values, query = rotated(by_head(rows), rope), torch.randn(1, 4, 320, 8), torch.randn(1, 8, s, 8)
    feed(cache, [keys[:, :, :-s]], [values[:, :, :-s]], rope)
    [(window, recent)] = feed(cache, [keys[:, :, -s:]], [values[:, :, -s:]], rope)
    handle = window._kvshrink
    assert handle.pages > 4
    all_keys, all_values = rebuild(handle, window, recent)
    torch.testing.assert_close((all_keys, all_values), (keys, values), atol=1e-4, rtol=0)

    def refuse(*args):
        raise AssertionError("a key was rebuilt")

    monkeypatch.setattr(attend_module, "keys_of", refuse)
    monkeypatch.setattr(BasisCodec, "decode", refuse)
    got = attend(query, window, recent, None, 0.3, None, handle)
    scores = query @ keys.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    causal = torch.arange(320) <= torch.arange(320 - s, 320)[:, None]
    want = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_layer_without_rope_has_the_plain_optimum(stats_of, rows):
    """Eckart-Young on the uncentred rows."""
    codec = key_codec(0.5, stats_of(SHAPE, keys=rows, pairs=None))
    lost = codec.decode(codec.encode(by_head(rows), None), 4) - by_head(rows)
    best = torch.linalg.svdvals(rows.double())[16:].norm()
    torch.testing.assert_close(lost.double().norm(), best, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("keep", "ranks"), [(1.0, (32, 32)), (0.5, (16, 16)), (0.48, (14, 15)), (2 / 32, (2, 2))])
def test_rank_rule(keep, ranks):
    assert RopeCommuting(keep=keep).ranks(SHAPE) == ranks


def test_the_dial_gives_every_number_of_pairs():
    values = RopeCommuting().budget_values(SHAPE, 100)
    assert [RopeCommuting(keep=k).ranks(SHAPE)[0] for k in values] == list(range(2, 33, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"keep": 1.1}, r"keep=1\.1 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"bits": 5}, r"bits=5 is not possible\. Use None or one of \(8, 4, 3, 2\)\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        RopeCommuting(**settings)


def test_too_small_a_share_is_refused():
    with pytest.raises(
        SettingError, match=r"^keep=0\.05 keeps no pair of 32 channels\. Use keep of at least 0\.0625\.$"
    ):
        RopeCommuting(keep=0.05).ranks(SHAPE)


@pytest.mark.parametrize("family", ["olmo2", "glm4", "phi3_partial"])
def test_fit_knows_which_channels_a_model_turns_together(family):
    """Halves of a head, neighbours on half of the channels, halves of half of the channels."""
    model = FAMILIES[family].build()
    rope = layers_of(model)[0].rope
    artifact = kvshrink.fit(model, RopeCommuting(keep=0.5), torch.randint(0, 97, (2, 64)), progress=False)
    heads = model.config.num_key_value_heads
    for fitted in artifact.layers.values():
        weight = fitted["key_up"][0].unflatten(-1, (heads, -1)).abs().sum(1)
        a, b = (weight[:, p] > 1e-6 for p in rope.pairs())
        assert torch.equal(a, b)
        assert bool(((a | b).sum(1) <= 1).all())
