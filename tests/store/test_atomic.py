"""Writers that are killed, that write at once, or that are pointed at something odd."""

import multiprocessing as mp
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch

from kvshrink.errors import ArtifactError
from kvshrink.store import atomic, files


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def in_child(work, *args) -> int:
    """The exit code of a forked process that does the work; negative if a signal ended it."""
    child = mp.get_context("fork").Process(target=work, args=args)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def killed_before(name: str, work, *args) -> int:
    """The exit code of a process that kills itself where it would call a function of `os` or `Path`."""

    def run() -> None:
        for place in (os, Path):
            if hasattr(place, name):
                setattr(place, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        work(*args)

    return in_child(run)


def test_what_a_killed_writer_left_is_cleared_by_the_next_one(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    assert killed_before("replace", files.write_json, path, {"new": 1}) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2, "a room is left"
    assert files.read_json(path) == {"old": 1}
    files.write_json(path, {"new": 2})
    assert names(tmp_path) == ["x.json"]


def test_a_room_in_which_somebody_works_is_left_alone(tmp_path):
    with atomic.staged({tmp_path / "a": lambda part: part.write_text("a")}):
        pass
    with atomic._room(tmp_path) as room:
        (room / "part").write_text("half")
        files.write_json(tmp_path / "b.json", {})
        assert (room / "part").read_text() == "half"
    assert names(tmp_path) == ["b.json"]


def test_others_files_of_a_like_name_stay(tmp_path):
    theirs = [".x.json.part", "x.part", ".kvshrink-notes.part", f".kvshrink-{'0' * 16}.part"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    files.write_json(tmp_path / "x.json", {})
    assert names(tmp_path) == sorted([*theirs, "x.json"])


def test_threads_and_processes_may_write_one_path(tmp_path):
    path, failed = tmp_path / "x.safetensors", []

    def write(n: int) -> None:
        try:
            for _ in range(5):
                files.write_tensors(path, {"a": torch.full((2000,), n)}, {"n": str(n)})
        except BaseException as error:
            failed.append(error)

    def both(n: int) -> None:
        threads = [threading.Thread(target=write, args=(n + i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    child = mp.get_context("fork").Process(target=both, args=(10,))
    child.start()
    both(0)
    child.join(60)
    assert (failed, child.exitcode) == ([], 0)
    tensors, metadata = files.read_tensors(path)
    assert bool((tensors["a"] == int(metadata["n"])).all())
    assert names(tmp_path) == ["x.safetensors"]


def test_a_link_is_written_through_and_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.json"
    link.symlink_to(tmp_path / "real" / "run3.json")
    files.write_json(link, {"a": 1})
    assert link.is_symlink()
    assert files.read_json(tmp_path / "real" / "run3.json") == {"a": 1}
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ArtifactError, match=r"^cannot write .*loop: .+\. [A-Z].+\.$"):
        files.write_json(loop, {})


def test_only_a_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "it is a device or a pipe"), (Path("/dev/null"), "it is a device or a pipe")):
        with pytest.raises(ArtifactError, match=rf"^cannot write {path}: {why}\. Choose another path\.$"):
            files.write_json(path, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_an_ordinary_write(tmp_path, mask):
    before = os.umask(mask)
    try:
        for name, write in (("a", lambda p: files.write_json(p, {})), ("b", lambda p: files.write_tensors(p, {}, {}))):
            write(tmp_path / name)
            (tmp_path / f"{name}2").write_text("")
            assert (tmp_path / name).stat().st_mode == (tmp_path / f"{name}2").stat().st_mode
            (tmp_path / name).chmod(0o640)
            write(tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_the_true_reason_is_told(tmp_path):
    for path, why in (
        (tmp_path / ("x" * 300), r"File name too long\. Use a shorter name\."),
        (tmp_path / "a\0b", r"embedded null byte\. Choose another path\."),
        (Path("/proc/kvshrink/x.json"), r".+\. .+\."),
    ):
        with pytest.raises(ArtifactError, match=f"^cannot write [^\n]+: {why}$"):
            files.write_json(path, {})


def test_a_name_of_any_length_that_the_system_takes_can_be_written(tmp_path):
    files.write_json(tmp_path / ("x" * 255), {"a": 1})
    assert files.read_json(tmp_path / ("x" * 255)) == {"a": 1}
