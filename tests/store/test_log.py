"""A log of measurements: what was damaged is measured again, and writers do not tear each other's lines."""

import json
import multiprocessing as mp
import os

import pytest

from kvshrink.errors import EvalError
from kvshrink.eval.run.outcomes import Outcome
from kvshrink.plan.bench import is_point
from kvshrink.store.digest import sealed
from kvshrink.store.log import Log

OUTCOME = Outcome("k", "t", "agnostic", 9, "rtn", 0, 0, None, 0.5, "x", ["a"], 50, 100, 400, 0.1, 0.2)
POINT = {"key": "k", "method": "rtn", "settings": {"bits": 4}, "kl": 0.5}
ROW = dict(vars(OUTCOME))
DAMAGE = [
    *({"score": x} for x in ("1", None, float("nan"), -1, [], True, 10**400)),
    *({"full": x} for x in (0, -1, 1.5, None, "400")),
    *({"nbytes": -1}, {"expected": "a"}, {"expected": [1]}, {"depth": "0"}, {"context": []}, {"key": ["k"]}),
    *({"more": 1}, {"task": 3}, {"seconds": float("inf")}),
]


@pytest.mark.parametrize("change", DAMAGE, ids=str)
@pytest.mark.parametrize("right", [False, True], ids=["as damage has it", "with a digest of its own"])
def test_a_damaged_outcome_is_not_taken(tmp_path, change, right):
    path = tmp_path / "log.jsonl"
    row = sealed(ROW | change) if right else sealed(ROW) | change
    path.write_text(json.dumps(row) + "\n")
    assert not Log(path).has("k", Outcome.of)


@pytest.mark.parametrize("kl", [float("nan"), -5, "0.1", None, [0.1], True])
def test_a_damaged_point_is_not_taken(tmp_path, kl):
    path = tmp_path / "log.jsonl"
    for row in (sealed(POINT) | {"kl": kl}, sealed(POINT | {"kl": kl}), {k: v for k, v in POINT.items() if k != "kl"}):
        path.write_text(json.dumps(row) + "\n")
        assert not Log(path).has("k", is_point)


@pytest.mark.parametrize("field", list(ROW))
def test_an_outcome_without_a_field_is_not_taken(tmp_path, field):
    (tmp_path / "log").write_text(json.dumps(sealed({k: v for k, v in ROW.items() if k != field})) + "\n")
    assert not Log(tmp_path / "log").has("k", Outcome.of)


def test_what_was_written_is_read_around_lines_that_were_not(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path).add(ROW)
    noise = [b"[" * 10**5, b"\xff\xfe", b"null", b"[1]", b'{"key": "k"}', b'{"key": "k", "sc', b"9" * 5000]
    path.write_bytes(b"\n".join(noise) + b"\n" + path.read_bytes() + b'{"key": "k", "sco')
    log = Log(path)
    assert Outcome.of(log.rows["k"]) == OUTCOME
    log.add(ROW | {"key": "l"})
    assert set(Log(path).rows) == {"k", "l"}, "the line that was cut is ended first"


def test_two_processes_append_to_one_log(tmp_path):
    path, large = tmp_path / "log.jsonl", "x" * 200_000

    def write(name: str) -> None:
        log = Log(path)
        for i in range(20):
            log.add({"key": f"{name}{i}", "text": large})

    child = mp.get_context("fork").Process(target=write, args=("a",))
    child.start()
    write("b")
    child.join(60)
    assert set(Log(path).rows) == {f"{n}{i}" for n in "ab" for i in range(20)}


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    Log(path).add(ROW)
    before, write = path.read_bytes(), os.write

    def half(fd, data):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(fd, data[: len(data) - 50])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(EvalError, match=r"^cannot write .*log\.jsonl: No space left on device\. Free some space"):
        Log(path).add(ROW | {"key": "l"})
    assert path.read_bytes() == before


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(EvalError, match=r"^cannot read [^\n]+\. Choose another folder\.$"):
            Log(path)
