import dataclasses
import itertools
import re

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.leank import LeanK
from tests.cache.build import feed, make

SMALL = LayerShape(1, 8, torch.float32)
PAIRS = (torch.arange(4), torch.arange(4, 8))


@pytest.fixture
def three(stats_of):
    """Facts of three layers, the keys of each `scale` times as large as those of the one before."""

    def build(scale: float) -> dict:
        made = {}
        for i in range(3):
            rows = torch.randn(300, 8) * torch.rand(8) * scale**i + 1
            energy = torch.rand(1, 4).double().repeat(1, 2) + 0.1
            made[i] = dataclasses.replace(stats_of(SMALL, keys=rows), pairs=PAIRS, query_energy=energy)
        return made

    return build


def finished(method: LeanK, stats: dict) -> tuple[dict, dict]:
    return method.finish({i: method.fit_layer(f) for i, f in stats.items()}, dict.fromkeys(stats, SMALL), None)


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_no_other_mask_of_the_same_size_loses_less(three, keep, fill):
    """Against every set of as many of the 12 pairs of three layers, by the error of the scores written out again."""
    stats = three(1.5)
    done, record = finished(LeanK(keep=keep, fill=fill), stats)
    lost = {}
    for i, f in stats.items():
        energy = f.key.covariance.diagonal() + (f.key.mean**2 if fill == "zero" else 0)
        for p in range(4):
            lost[i, p] = float((energy[p] + energy[p + 4]) * f.query_energy[0, p])
    count = int(12 * keep)
    best = max(itertools.combinations(lost, count), key=lambda chosen: sum(lost[x] for x in chosen))
    kept = {(i, c) for i, x in done.items() for c in x["key_kept"].tolist()}
    assert kept == {(i, c) for i, p in best for c in (p, p + 4)}
    assert record == {"key_channels": {str(i): len(x["key_kept"]) for i, x in done.items()}}


def test_all_layers_together_hold_what_was_promised_of_each(three):
    for keep in (0.25, 0.4, 0.5, 1.0):
        method = LeanK(keep=keep)
        done, _ = finished(method, three(3.0))
        held = sum(method.bits_per_token(SMALL, x) for x in done.values())
        assert held == 3 * method.bits_per_token(SMALL, {})


@pytest.mark.parametrize("bits", [None, 4])
def test_a_layer_may_be_left_without_any_key(three, bits):
    """Its keys are the mean; it holds no key byte, and the cache reads it."""
    method = LeanK(keep=0.25, bits=bits)
    done, _ = finished(method, three(50.0))
    sizes = [len(done[i]["key_kept"]) for i in range(3)]
    assert sizes[0] == 0
    assert sum(sizes) == 6
    cache = make(method, SMALL, list(done.values()))
    rows = [torch.randn(2, 1, 200, 8) for _ in range(3)]
    feed(cache, rows, [r.clone() for r in rows])
    for i, layer in enumerate(cache.layers):
        assert layer.held().total == method.layer_bytes(SMALL, done[i], 200, 2)
        records = layer.pages.records()
        held = sum(records[name].nbytes for name in records if name.startswith("k."))
        assert held == 2 * len(layer.pages) * layer.codecs[0].page_bytes()
    codec = cache.layers[0].codecs[0]
    assert codec.page_bytes() == 0
    back = codec.decode(codec.encode(rows[0][:, :, :64], None), 1)
    assert torch.equal(back, done[0]["key_fill"].expand(2, 1, 64, 8))


def test_heads_compete(stats_of):
    """A head whose queries are ten times as large keeps its channels at the cost of the other."""
    shape = LayerShape(2, 8, torch.float32)
    stats = stats_of(shape, keys=torch.randn(400, 16))
    energy = torch.tensor([[1.0], [10.0]]).expand(2, 8).double()
    stats = dataclasses.replace(stats, pairs=PAIRS, query_energy=energy)
    method = LeanK(keep=0.5)
    assert method.fit_layer(stats)["key_kept"].tolist() == list(range(8, 16))
    done, _ = method.finish({0: method.fit_layer(stats)}, {0: shape}, None)
    assert done[0]["key_kept"].tolist() == list(range(8, 16))
    assert set(done[0]) == {"key_kept", "key_fill"}, "what no cache reads is not kept"


def test_the_dial_reaches_every_number_of_pairs():
    shape = LayerShape(8, 128, torch.bfloat16)
    sizes = [LeanK(keep=v).bits_per_token(shape, {}) for v in LeanK().budget_values(shape, 1000)]
    assert sizes == [(r + 1024) * 16 for r in range(2, 1025, 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep=0 is not possible. Use a share of key channels above 0, up to 1."),
        ({"bits": 5}, "bits=5 is not possible. Use None or one of (8, 4, 3, 2)."),
        ({"fill": ""}, "fill='' is not possible. Use 'mean' or 'zero'."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = LeanK()
    for name, value in settings.items():
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        method.check()


def test_a_keep_without_a_pair_is_refused():
    with pytest.raises(SettingError, match=r"^keep=0\.2 keeps no pair of 8 channels\. Use keep of at least 0\.25\.$"):
        LeanK(keep=0.2).bits_per_token(SMALL, {})
