"""What is told of a store and of an engine: JSON of any content, in one line each."""

from pathlib import Path

import pytest
import torch

import kvshrink
from kvshrink.errors import KVShrinkError
from kvshrink.serve.settings import EngineSettings, Named, StoreSettings, identity, key_of, size_of, weights_of
from kvshrink.serve.source import records_of
from kvshrink.serve.vllm import why_not

WRONG_STORES = [
    {},
    {"path": ""},
    {"path": 3},
    {"path": "/x", "limit": "much"},
    {"path": "/x", "limit": 0},
    {"path": "/x", "limit": True},
    {"path": "/x", "exact": -1},
    {"path": "/x", "exact": 1.5},
    {"path": "/x", "method": None},
    {"path": "/x", "method": "a", "artifact": "b"},
    {"path": "/x", "depth": 3},
]
WRONG_ENGINES = [
    None,
    [],
    "rtn",
    {},
    {"method": 3},
    {"artifact": "a", "prefill": "all"},
    {"method": "rtn", "sinks": -1},
]


@pytest.mark.parametrize("given", WRONG_STORES, ids=str)
def test_a_store_that_cannot_be(given):
    with pytest.raises(KVShrinkError, match=r"^[^\n]+\.$"):
        StoreSettings.of(given)


@pytest.mark.parametrize("given", WRONG_ENGINES, ids=str)
def test_an_engine_that_cannot_be(given):
    with pytest.raises(KVShrinkError, match=r"^[^\n]+\.$"):
        EngineSettings.of(given)


@pytest.mark.parametrize("method", ["nothing", "rtn:bits=40", "/no/such/folder", "full"])
def test_a_method_that_is_none(method):
    with pytest.raises(KVShrinkError, match=r"^[^\n]+[.?]$"):
        StoreSettings.of({"path": "/x", "method": method}).method.made()


def test_settings_and_sizes():
    store = StoreSettings.of({"path": "/x", "artifact": "a", "limit": "1.5 GiB", "exact": 0})
    assert (store.path, store.method, store.limit, store.exact) == ("/x", Named("a", True), 3 * 2**29, 0)
    with pytest.raises(KVShrinkError, match="no artifact"):
        StoreSettings.of({"path": "/x", "artifact": "/no/such"}).method.made()
    assert StoreSettings.of({"path": "/x", "limit": None}).limit is None
    assert StoreSettings.of({"path": "/x", "method": "none"}).method.made() is None
    assert [size_of(x) for x in ("20GB", "3", "2KiB", "1 t")] == [20 * 10**9, 3, 2048, 10**12]
    assert EngineSettings.of({"method": "rtn"}) == EngineSettings(Named("rtn"), "chunk", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = kvshrink.reference_model("float32")[0]
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def test_blocks_of_other_weights_methods_or_adapters_are_others(saved, tmp_path):
    model, folder = saved
    weights = next(folder.glob("*.safetensors"))
    method = StoreSettings.of({"path": "/x"}).method.made()
    same = identity(folder, method, 1, tokens=32)
    assert same == identity(folder, method, 1, tokens=32)
    others = [(0, method, 32), (1, method, 64), (1, None, 32)]
    assert all(same != identity(folder, m, exact, tokens=t) for exact, m, t in others)
    for name in ("layers.2.mlp.up_proj.weight", "layers.0.self_attn.k_proj.weight", "norm.weight"):
        weight = model.model.get_parameter(name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight += 0.01
        model.save_pretrained(tmp_path)
        assert weights.stat().st_size == next(tmp_path.glob("*.safetensors")).stat().st_size
        assert weights_of(folder) != weights_of(tmp_path), name
        with torch.no_grad():
            weight.copy_(before)
    model.save_pretrained(tmp_path)
    assert weights_of(folder) == weights_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(KVShrinkError, match="no weights are in"):
        weights_of(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"a")
    one = weights_of(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"b")
    assert one != weights_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header at all")
    with pytest.raises(KVShrinkError, match="is no safetensors file"):
        weights_of(tmp_path)
    keys = {key_of(same, b"ab"), key_of(same, b"a", "b"), key_of(same, b"", "ab"), key_of(same + "a", b"b")}
    assert len(keys) == 4
    assert all(len(key) == 64 for key in keys)


def test_records_of_files_are_those_of_the_model_in_memory(saved):
    model, folder = saved
    method = StoreSettings.of({"path": "/x"}).method.made()
    from kvshrink.serve.records import PageRecords

    one, other = records_of(str(folder), method, torch.float32), PageRecords.of(model, method)
    assert (one.nbytes, [p.layers for p in one.alike]) == (other.nbytes, [p.layers for p in other.alike])
    assert torch.equal(one.alike[0].rope.inv_freq, other.alike[0].rope.inv_freq)
    with pytest.raises(KVShrinkError, match="no model"):
        records_of(str(Path(folder) / "nowhere"), method)


def test_another_vllm_is_named(monkeypatch):
    assert "Install vllm>=0.32,<0.34" in str(why_not(("no-such-package",)))
    monkeypatch.setattr("kvshrink.serve.vllm.version", lambda name: "0.32.1+cpu")
    assert why_not() is None
    monkeypatch.setattr("kvshrink.serve.vllm.version", lambda name: "0.34.0")
    assert "vLLM 0.34.0" in why_not()
