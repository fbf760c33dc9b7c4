"""A file is whole or not there at all, and what was there before stays if a save fails."""

import errno
import os

import pytest
import torch

from kvshrink.errors import ArtifactError
from kvshrink.store import files

BROKEN = r"^[^\n]*/x\.[a-z]+ cannot be read: [^\n]+\. It is truncated or edited; make it again\.$"
FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*args, **kwargs):
    raise FULL


def half_written(tensors, path, metadata=None):
    path.write_bytes(b"half of it")
    raise FULL


@pytest.fixture
def old(tmp_path):
    """A file of tensors that an earlier save left."""
    path = tmp_path / "folder" / "x.safetensors"
    files.write_tensors(path, {"a": torch.arange(5)}, {"made": "before"})
    return path


def names(path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_tensors_round_trip(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "b": torch.arange(6, dtype=torch.uint8).view(2, 3).T,
        "c": torch.zeros(0, 4),
        "d": torch.tensor(1.5),
        "e": torch.randn(3, 1).expand(3, 7),
    }
    files.write_tensors(tmp_path / "new" / "x.safetensors", tensors, {"k": "v"})
    back, metadata = files.read_tensors(tmp_path / "new" / "x.safetensors")
    assert metadata == {"k": "v"}
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)
    assert names(tmp_path / "new" / "x.safetensors") == ["x.safetensors"]


def test_a_view_is_written_without_the_buffer_behind_it(tmp_path):
    files.write_tensors(tmp_path / "x", {"a": torch.zeros(10**6)[:10], "b": torch.zeros(10**6)[:10]}, {})
    assert (tmp_path / "x").stat().st_size < 1000


@pytest.mark.parametrize(
    ("module", "name", "failure"),
    [(files, "save_file", full), (files, "save_file", half_written), (os, "fsync", full)],
    ids=["at once", "half way", "at fsync"],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(old, monkeypatch, module, name, failure):
    before = old.read_bytes()
    monkeypatch.setattr(module, name, failure)
    with pytest.raises(ArtifactError, match=r"^cannot write .*x\.safetensors: No space left on device\. .*folder\.$"):
        files.write_tensors(old, {"a": torch.zeros(3)}, {})
    assert old.read_bytes() == before
    assert names(old) == ["x.safetensors"], "a partial file stayed behind"


def test_a_failed_first_save_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        files.write_json(tmp_path / "x.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_interrupted_leaves_the_old_file(old, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    before = old.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_tensors(old, {"a": torch.zeros(3)}, {})
    assert old.read_bytes() == before
    assert names(old) == ["x.safetensors"]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"^cannot write .*/x\.json: .*/file is no folder\. Choose another path\.$"):
        files.write_json(tmp_path / "file" / "x.json", {})
    (tmp_path / "dir").mkdir()
    with pytest.raises(ArtifactError, match=r"^cannot write .*/dir: Is a directory\."):
        files.write_json(tmp_path / "dir", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "file"]


@pytest.mark.parametrize("kept", [0, 4, 9, 60, -1])
def test_a_truncated_file_is_refused(old, kept):
    old.write_bytes(old.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=BROKEN):
        files.read_tensors(old)


def test_other_bytes_are_refused(old):
    old.write_bytes(os.urandom(500))
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.read_tensors(old)


@pytest.mark.parametrize("read", [files.read_tensors, files.read_json])
def test_a_missing_file_is_refused(tmp_path, read):
    with pytest.raises(ArtifactError, match=r"^.*nothing does not exist\. Check the path, or save it first\.$"):
        read(tmp_path / "nothing")


def test_json_round_trip(tmp_path):
    data = {"a": [1, None, "é"], "b": {"c": 0.1}}
    files.write_json(tmp_path / "x.json", data)
    assert files.read_json(tmp_path / "x.json") == data


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"nonsense"])
def test_edited_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=BROKEN):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_of_another_kind_is_refused(tmp_path, text, kind):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=rf"holds a {kind}, not an object\. It is edited; make it again\.$"):
        files.read_json(tmp_path / "x.json")
