"""Records of pages against what a cache itself holds of the same tokens, and what has no records."""

import pytest
import torch

import kvshrink
from kvshrink import CSKV, Spectral, methods
from kvshrink.attach.fill import held_by, prefill
from kvshrink.cache.attend import rebuild
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.methods.artifact import Artifact
from kvshrink.serve.records import PageRecords
from tests.tiny import build

IDS = torch.randint(10, 3000, (1, 224), generator=torch.Generator().manual_seed(0))
METHODS = ["turboquant:bits=4", "rtn", "kivi:bits=2", "nvfp4", "cskv", "cskv joint", "fast", "accurate"]


@pytest.fixture(scope="module")
def model():
    return kvshrink.reference_model("float32")[0]


@pytest.fixture(scope="module")
def method_of(model):
    texts = torch.randint(10, 3000, (4, 256), generator=torch.Generator().manual_seed(1))
    asked = {
        "cskv": CSKV(keep=0.5, bits=4),
        "cskv joint": CSKV(keep=0.5, bits=None, group_heads=2),
        "fast": Spectral(budget=0.2, speed="fast", allocation="energy"),
        "accurate": Spectral(budget=0.2, speed="accurate", allocation="energy"),
    }
    fitted: dict[str, Artifact] = {}

    def get(name):
        if name not in asked:
            return parse(name).method
        if name not in fitted:
            fitted[name] = kvshrink.fit(model, asked[name], texts, progress=False)
        return fitted[name]

    return get


def rows_of(model, ids):
    return {i: held_by(layer) for i, layer in enumerate(prefill(model, ids).layers)}


def blocks(rows, size):
    """[1, h, t, d] as [p, h, size, d]."""
    return {i: tuple(x[0].unflatten(1, (-1, size)).transpose(0, 1) for x in pair) for i, pair in rows.items()}


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_records_give_back_what_a_cache_reads(model, method_of, name):
    """In blocks of one page and of several: page 0 aside, whose first tokens a cache keeps exactly."""
    method = method_of(name)
    records, cache = PageRecords.of(model, method), kvshrink.make_cache(model, method)
    model(IDS, past_key_values=cache)
    rows = rows_of(model, IDS)
    pages = cache.layers[0].pages
    assert records.nbytes == sum(layer.pages.layout.size for layer in cache.layers)
    for size in (records.page, records.page * 7):
        first = torch.arange(0, IDS.shape[1], size)
        packed = records.pack(blocks(rows, size), first)
        assert packed.shape == (len(first), size // records.page * records.nbytes)
        got = records.unpack(packed, first)
        assert list(got) == list(range(len(cache.layers)))
        if size == records.page:  # the very bytes, sinks' page among them, but for sums in another order
            held = [layer.pages.records().bytes[0, 0] for layer in cache.layers]
            other = [
                int((records.at(i).pack(*blocks(rows, size)[i], first)[: len(x), 0] != x).sum())
                for i, x in enumerate(held)
            ]
            assert sum(other) <= 2e-3 * sum(x.numel() for x in held)
        for i, layer in enumerate(cache.layers):
            stored = slice(records.page, len(pages) * records.page)
            want = rebuild(layer.snapshot(kvshrink.attach(model).layers[i].rope), *layer.window.view())
            for mine, theirs, exact in zip(got[i], want, rows[i], strict=True):
                whole = mine.transpose(0, 1).flatten(1, 2)[None]
                torch.testing.assert_close(whole[:, :, stored], theirs[:, :, stored], rtol=1e-4, atol=1e-4)
                assert not torch.equal(whole[:, :, stored], exact[:, :, stored])


@torch.inference_mode()
def test_a_record_depends_on_its_own_tokens_and_place_alone(model):
    records, rows = PageRecords.of(model, parse("turboquant:bits=4").method), blocks(rows_of(model, IDS), 32)
    first = torch.arange(0, IDS.shape[1], 32)
    whole = records.pack(rows, first)
    for n in (0, 3):
        alone = records.pack({i: (k[n : n + 1], v[n : n + 1]) for i, (k, v) in rows.items()}, first[n : n + 1])
        assert torch.equal(alone[0], whole[n])
    assert records.pack({i: (k[:0], v[:0]) for i, (k, v) in rows.items()}, first[:0]).shape == (0, records.nbytes)


@torch.inference_mode()
def test_sliding_layers_are_kept_as_they_are():
    model = build("text", "gemma3_text")
    ids = torch.randint(1, 50, (1, 64), generator=torch.Generator().manual_seed(0))
    records, cache = PageRecords.of(model, parse("turboquant:bits=4").method), prefill(model, ids)
    rows = {i: held_by(layer) for i, layer in enumerate(cache.layers)}
    rows = {i: tuple(x[:, :, -32:] for x in pair) for i, pair in rows.items()}
    rows = {i: tuple(torch.nn.functional.pad(x, (0, 0, 32 - x.shape[2], 0)) for x in p) for i, p in rows.items()}
    got = records.unpack(records.pack(rows, torch.tensor([32])), torch.tensor([32]))
    same = {i: all(torch.equal(a, b) for a, b in zip(got[i], rows[i], strict=True)) for i in rows}
    kinds = [info.kind for info in kvshrink.attach(model).layers]
    assert same == {i: kind == "sliding_attention" for i, kind in enumerate(kinds)}
    assert set(same.values()) == {True, False}


@pytest.mark.parametrize("name", ["snapkv", "snapkv + turboquant:bits=4", "h2o", "zipcache"])
def test_what_ranks_tokens_has_no_records(model, name):
    with pytest.raises(SettingError, match=r"ranks or drops|importance"):
        PageRecords.of(model, parse(name).method)


def test_every_quantiser_that_learns_nothing_has_records_or_says_why_not(model):
    made, refused = [], []
    for name, path in methods.names().items():
        kind = methods.get(name)
        if ".quant." in path and kind.needs_fit is False:
            try:
                made.append((name, PageRecords.of(model, kind())))
            except SettingError:
                refused.append(name)
    assert len(made) > 10
    assert len(refused) < 6, refused
