"""The drift watch: about 1 on text like the calibration's, large where a basis does not fit, and never in the way."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import CSKV, RTN, methods
from kvshrink.cache.drift import Drift, DriftWatch, Reference
from kvshrink.errors import CacheError, SettingError
from kvshrink.methods._codecs.basis import principal
from kvshrink.methods._stats import LayerShape

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    yield net
    kvshrink.detach(net)


@pytest.fixture(scope="module")
def rows():
    """Calibration text of the first 20 of 61 tokens."""
    return torch.randint(0, 20, (16, 256), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def artifact(model, rows):
    return kvshrink.fit(model, CSKV(keep=0.4, bits=4, window=8), rows, progress=False)


def read(model, cache, ids, **kwargs):
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, **kwargs)
    return cache.report()


def test_text_like_the_calibration_has_a_drift_of_one_and_other_text_more(model, artifact):
    generator = torch.Generator().manual_seed(5)
    like = torch.randint(0, 20, (2, 300), generator=generator)
    other = torch.randint(20, 61, (2, 300), generator=generator)
    report = read(model, kvshrink.make_cache(model, artifact, watch=True), like)
    for row in report.rows:
        assert row.drift.key == pytest.approx(1, abs=0.1)
        assert row.drift.value == pytest.approx(1, abs=0.1)
    assert not report.drifted
    report = read(model, kvshrink.make_cache(model, artifact, watch=True), other)
    assert max(report.rows[0].drift) > 2
    assert report.drifted
    assert report.to_dict()["drifted"] is True
    assert report.to_dict()["layers"][0]["drift"] == report.rows[0].drift._asdict()
    lines = str(report).splitlines()
    assert lines[0].endswith("key drift  value drift")
    assert lines[1].split()[-2:] == [f"{x:.2f}" for x in report.rows[0].drift]


@pytest.mark.parametrize("change", ["shuffled", "scaled"])
def test_channels_that_change_places_or_sizes_show(change):
    """Rows of a layer without a model, on the method's own codecs."""
    shape, method = LayerShape(2, 8, torch.float32), CSKV(keep=0.5)
    rows = torch.randn(640, 16) @ torch.diag(2.0 ** -torch.arange(16)) @ torch.randn(16, 16) + 1
    mean, up = rows.mean(0), principal(rows.T.cov(correction=0), 1, 8)[1].float()
    fitted = {f"{kv}_{name}": t for kv in ("key", "value") for name, t in (("up", up), ("mean", mean[None]))}
    codecs = method.codecs(shape, fitted)
    own = [((rows - _there(c, rows)).square().sum() / (rows - mean).square().sum()).item() for c in codecs]
    pair = [Reference(c.smooth, mean, e) for c, e in zip(codecs, own, strict=True)]
    watch = DriftWatch(tuple(pair))
    watch.add(_heads(rows), _heads(rows), None)
    assert watch.drift() == pytest.approx((1, 1), rel=1e-3)
    moved = rows.roll(5, 1) if change == "shuffled" else rows * torch.tensor([4.0, 0.25]).repeat(8)
    watch.clear()
    watch.add(_heads(moved), _heads(rows), None)
    assert watch.drift().key > 10
    assert watch.drift().value == pytest.approx(1, rel=1e-3)
    assert watch.drift().drifted


def _heads(rows):
    return rows.unflatten(1, (2, 8)).transpose(0, 1)[None]


def _there(codec, rows):
    return codec.smooth(_heads(rows))[0].transpose(0, 1).flatten(1)


def test_sums_are_those_of_the_tokens_in_the_body(model, artifact, rows):
    """Golden source: keys and values as the layer makes them, the basis by hand; pads and sinks do not count."""
    from kvshrink.attach.asking import key_value

    cache, seen = kvshrink.make_cache(model, artifact, watch=True), []
    ids = rows[:2, :200]
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, :37] = 0  # left pads
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(lambda m, a, k: seen.append(key_value(m, k)), with_kwargs=True)
    read(model, cache, ids[:, :150], attention_mask=mask[:, :150])
    for at in range(150, 200):  # token by token: whole pages leave the window one by one
        read(model, cache, ids[:, at : at + 1], attention_mask=mask[:, : at + 1])
    hook.remove()
    layer, fitted = cache.layers[0], artifact.layers[0]
    for n, kv in enumerate(("key", "value")):
        x = torch.cat([pair[n] for pair in seen], 2).transpose(1, 2).flatten(2).double()
        last = int(layer.pages.first.max()) + 32
        body = torch.cat([x[0, 4:last], x[1, 37 + 4 : last]])
        up, mean = fitted[f"{kv}_up"][0].double(), fitted[f"{kv}_mean"][0].double()
        back = (body - mean) @ up.T @ up + mean
        wanted = [(body - back).square().sum(), (body - fitted[f"{kv}_centre"].double()).square().sum()]
        torch.testing.assert_close(layer.watch.sums[n], torch.stack(wanted), rtol=1e-4, atol=0)
        ratio = wanted[0] / wanted[1] / artifact.provenance["layers"]["0"][f"{kv}_error"]
        assert layer.watch.drift()[n] == pytest.approx(float(ratio), rel=1e-4)


def test_watching_changes_no_token_and_no_page(model, artifact, rows):
    plain, watched = (kvshrink.make_cache(model, artifact, watch=w) for w in (False, True))
    for cache in (plain, watched):
        read(model, cache, rows[:1])
    for a, b in zip(plain.layers, watched.layers, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a.pages.tensors(), b.pages.tensors(), strict=True))
    more = watched.report().nbytes - plain.report().nbytes
    assert more == len(watched.layers) * 4 * 8, "two float64 sums a layer for keys and for values, whatever the length"


def test_without_watch_nothing_is_said(model, artifact, rows):
    report = read(model, kvshrink.make_cache(model, artifact), rows[:1])
    assert "drift" not in str(report)
    assert "drifted" not in report.to_dict()
    assert "drift" not in report.to_dict()["layers"][0]
    with pytest.raises(CacheError, match=r"^the cache does not watch its drift\. Make it with .*watch=True\)\.$"):
        _ = report.drifted
    fresh = kvshrink.make_cache(model, artifact, watch=True).report()
    assert fresh.rows[0].drift == Drift(None, None)
    assert not fresh.drifted


def test_the_sums_are_saved_forked_and_forgotten(model, artifact, rows, tmp_path):
    cache = kvshrink.make_cache(model, artifact, watch=True)
    read(model, cache, rows[:1, :200])
    cache.save(tmp_path / "watched")
    back = kvshrink.make_cache(model, artifact, watch=True).load(tmp_path / "watched")
    fork = copy.deepcopy(cache)
    before = cache.layers[0].watch.sums.clone()
    for other in (back, fork):
        assert torch.equal(other.layers[0].watch.sums, before)
        read(model, other, rows[1:2, :100])
        assert other.layers[0].watch.sums[0, 0] > before[0, 0]
    assert torch.equal(cache.layers[0].watch.sums, before)
    plain = kvshrink.make_cache(model, artifact).load(tmp_path / "watched")
    plain.save(tmp_path / "plain")
    assert plain.get_seq_length() == 200
    later = kvshrink.make_cache(model, artifact, watch=True).load(tmp_path / "plain")
    assert later.report().rows[0].drift == Drift(None, None)
    read(model, later, rows[1:2, :100])
    assert later.report().rows[0].drift.key > 0
    cache.reset()
    assert not cache.layers[0].watch.sums.any()


@pytest.mark.parametrize("method", [RTN(), "earlier", "spectral"], ids=str)
def test_what_has_no_calibration_error_cannot_be_watched(model, rows, artifact, method):
    """Spectral rounds by the calibration's variances: its drift is not in the basis alone."""
    if method == "spectral":
        wide = methods.build("spectral", {"budget": 0.1, "allocation": "energy"})
        method = kvshrink.fit(model, wide, rows, progress=False)
    elif isinstance(method, str):  # an artifact of an earlier version
        layers = {i: {k: t for k, t in x.items() if not k.endswith("_errors")} for i, x in artifact.layers.items()}
        method = kvshrink.Artifact(artifact.method, layers, artifact.model)
    with pytest.raises(SettingError, match=r"^this \w+ has no error on a calibration text to watch\. .*watch=False\.$"):
        kvshrink.make_cache(model, method, watch=True)


def test_a_cut_artifact_is_watched_against_its_own_error(model, rows):
    high = kvshrink.fit(model, CSKV(keep=0.8, window=8), rows, progress=False)
    low = kvshrink.fit(model, CSKV(keep=0.3, window=8), rows, progress=False)
    cut, fitted = (kvshrink.make_cache(model, a, watch=True) for a in (high.at(0.3), low))
    for cache in (cut, fitted):
        read(model, cache, rows[:1])
    for a, b in zip(cut.report().rows, fitted.report().rows, strict=True):
        assert a.drift == pytest.approx(b.drift, rel=1e-3)
