"""Files that come in: what is no ordinary file, too large, too deep or no text is refused at once, in one line."""

import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest
import torch

from kvshrink.errors import ArtifactError
from kvshrink.store import files
from kvshrink.store.digest import digest, sealed, unsealed
from kvshrink.store.parse import parsed

LINE = re.compile(r"[^\n]{1,400}\.")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b'{"a": ' + b"[" * 40 + b"1" + b"]" * 40 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 9223372036854775808}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"a": 1, "a": 2}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"a": "\xff"}',
        b'{"a": 1} {}',
        b" ",
        b"[" + b"[]," * 300_000 + b"[]]",
    ],
)
def test_json_that_we_would_not_have_written_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ArtifactError) as caught:
        files.read_json(path)
    assert LINE.fullmatch(str(caught.value))


def test_many_values_are_refused_before_they_are_made():
    text = "[" + "[]," * 2**20 + "[]]"
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than"):
        parsed(text)
    assert tracemalloc.get_traced_memory()[1] < 2**16
    tracemalloc.stop()


def test_json_of_ours_is_read():
    data = {"a": [1, -(2**63), 2**63 - 1, 0.1, 1e308, True, None, "\u00e9\U0001f600"], "b": {"c": [[[[]]]]}}
    assert parsed(json.dumps(data)) == data
    assert parsed('{"a": NaN}', finite=False)["a"] != parsed('{"a": NaN}', finite=False)["a"]


@pytest.mark.parametrize("read", [files.read_json, files.read_tensors, files.read_about])
def test_what_is_no_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", 10**12)  # a hole
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        tmp_path / "pipe",
        Path("/dev/zero"),
        tmp_path,
        tmp_path / "loop",
        tmp_path / "huge.json",
        Path("a\0b"),
        Path("x" * 300),
    ):
        with pytest.raises(ArtifactError) as caught:
            read(path)
        assert LINE.fullmatch(str(caught.value))


def test_a_digest_is_of_names_kinds_and_bits():
    plain, tensors = {"a": 1, "b": [1.5, {"2": 3}]}, {"x": torch.arange(6), "y": torch.ones(2, 3).bfloat16()}
    same = digest({"b": (1.5, {2: 3}), "a": 1}, dict(reversed(tensors.items())))
    assert digest(plain, tensors) == same
    others = [
        digest({**plain, "a": 2}, tensors),
        digest(plain, {**tensors, "x": torch.arange(6).view(2, 3)}),
        digest(plain, {**tensors, "x": torch.arange(6).int()}),
        digest(plain, {"y": tensors["x"], "x": tensors["y"]}),
        digest(plain, {"x": tensors["x"]}),
        digest(plain, {**tensors, "z": torch.tensor(0.0)}),
    ]
    assert len({same, *others}) == 7


def test_a_seal_is_of_all_values():
    assert unsealed(sealed({"a": [1, 2]})) == {"a": [1, 2]}
    assert unsealed({**sealed({"a": [1, 2]}), "b": 1}) is None
    assert unsealed({"a": 1}) is None
