"""What is deflated comes back bit for bit, and a damaged stream is refused in one line."""

import json
import zlib

import pytest
import torch

from kvshrink.errors import ArtifactError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.store import files
from kvshrink.store.deflate import KEY, deflated, inflated
from tests.cache.build import bases, feed, make

REFUSED = r"^a deflated tensor is damaged \([^\n]+\)\. Save it again\.$"
SMALL = LayerShape(2, 8, torch.float32)


def tensors() -> dict:
    return {
        "bf16": torch.randn(3, 4000).bfloat16(),
        "f16": torch.randn(1000).half(),
        "f32": torch.randn(50, 4, 5),
        "nan": torch.tensor([[float("nan"), -0.0, float("inf")]]).expand(90, 3),
        "u8": torch.randint(0, 7, (30, 40), dtype=torch.uint8),
        "noise": torch.randint(0, 256, (1000,), dtype=torch.uint8),
        "i32": torch.arange(2000, dtype=torch.int32).view(2, -1).T,
        "i64": torch.arange(500),
        "bool": torch.ones(700, dtype=torch.bool),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_bits_come_back(tmp_path):
    before = tensors()
    files.write_tensors(tmp_path / "x", *deflated(before))
    back = inflated(*files.read_tensors(tmp_path / "x"))
    assert back.keys() == before.keys()
    for name, tensor in before.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert bits(back[name]) == bits(tensor), name


def test_nothing_gets_larger_and_numbers_get_smaller():
    before = tensors()
    after, metadata = deflated(before)
    assert all(after[k].nbytes <= t.nbytes for k, t in before.items())
    streams = json.loads(metadata[KEY])
    assert {"bf16", "f16", "f32", "nan", "u8", "i32", "i64", "bool"} == set(streams)
    assert after["noise"] is before["noise"]
    whole = zlib.compress(bits(before["bf16"]), 6)
    assert len(after["bf16"]) < 0.97 * len(whole), "byte planes must be worth it"


def test_tensors_without_metadata_are_as_they_are():
    before = tensors()
    assert inflated(before, {}) == before


def break_stream(after, streams):
    after["bf16"] = after["bf16"].clone()
    after["bf16"][40] ^= 16


def cut(after, streams):
    after["bf16"] = after["bf16"][:-9]


def no_end(after, streams):
    after["bf16"] = after["bf16"][:-1]


def larger_than_said(after, streams):
    streams["bf16"] = ["bfloat16", [3, 3999]]


def smaller_than_said(after, streams):
    streams["bf16"] = ["bfloat16", [3, 4001]]


def no_tensor(after, streams):
    del after["bf16"]


def no_dtype(after, streams):
    streams["bf16"][0] = "bfloat17"


def no_shape(after, streams):
    streams["bf16"] = 3


@pytest.mark.parametrize(
    "damage",
    [break_stream, cut, no_end, larger_than_said, smaller_than_said, no_tensor, no_dtype, no_shape],
)
def test_damage_is_refused(damage):
    after, metadata = deflated(tensors())
    streams = json.loads(metadata[KEY])
    damage(after, streams)
    with pytest.raises(ArtifactError, match=REFUSED):
        inflated(after, {KEY: json.dumps(streams)})


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_edited_description_is_refused(text):
    after, _ = deflated(tensors())
    with pytest.raises(ArtifactError, match=REFUSED):
        inflated(after, {KEY: text})


def cache_of(tokens: int):
    method = CSKV(keep=0.5, bits=4)
    cache = make(method, SMALL, [bases(SMALL, *method.ranks(SMALL))])
    if tokens:
        rows = torch.randn(2, 2, tokens, 8)
        feed(cache, [rows], [rows.clone()])
    return cache


@pytest.mark.parametrize("tokens", [0, 20, 300])
def test_a_cache_loads_as_it_was(tmp_path, tokens):
    """Deflated or not: the same state, and the deflated file is the smaller one."""
    cache = cache_of(tokens)
    cache.save(tmp_path / "plain")
    cache.save(tmp_path / "small", deflate=True)
    wanted = cache.state_dict()
    for name in ("plain", "small"):
        state = cache_of(0).load(tmp_path / name).state_dict()
        assert state.keys() == wanted.keys()
        assert all(bits(state[k]) == bits(t) for k, t in wanted.items())
    assert (tmp_path / "small").stat().st_size < (tmp_path / "plain").stat().st_size or not tokens


def test_a_cache_with_a_damaged_stream_is_not_loaded(tmp_path):
    cache_of(300).save(tmp_path / "x", deflate=True)
    data = bytearray((tmp_path / "x").read_bytes())
    data[-200] ^= 255
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ArtifactError, match=REFUSED):
        cache_of(0).load(tmp_path / "x")
