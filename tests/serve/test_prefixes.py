"""A folder of blocks under everything that may happen to files."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from hashlib import sha256

import pytest

from kvshrink.errors import SettingError
from kvshrink.serve import prefixes
from kvshrink.serve.prefixes import HEAD, PrefixStore


def key(n):
    return sha256(str(n).encode()).hexdigest()


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_what_is_put_comes_back_also_in_another_process(tmp_path):
    store = PrefixStore(tmp_path / "a" / "b")
    assert store.get(key(1)) is None
    assert key(1) not in store
    assert store.put(key(1), b"tokens" * 100)
    assert key(1) in store
    code = f"from kvshrink.serve.prefixes import PrefixStore; print(PrefixStore({str(store.folder)!r}).get({key(1)!r}))"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip() == str(b"tokens" * 100)
    assert store.counts | {"bytes_written": 0} == dict.fromkeys(store.counts, 0) | {"misses": 1}
    assert store.nbytes == store.counts["bytes_written"] == 600 + HEAD.size


@pytest.mark.parametrize("damage", ["cut", "empty", "head", "flip", "renamed", "version", "longer"])
def test_a_damaged_file_is_deleted_and_is_not_there(tmp_path, damage, caplog):
    store = PrefixStore(tmp_path)
    store.put(key(1), bytes(range(256)))
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "renamed":  # another block's content under this name
        store.put(key(2), b"other")
        os.replace(store._path(key(2)), path)
    elif damage == "version":
        path.write_bytes(
            HEAD.pack(*(v + (i == 1) if i == 1 else v for i, v in enumerate(HEAD.unpack_from(data))))
            + data[HEAD.size :]
        )
    else:
        data[-1] ^= damage == "flip"
        path.write_bytes({"cut": data[:-1], "empty": b"", "head": data[:20], "longer": data + b"x"}.get(damage, data))
    assert store.get(key(1)) is None
    assert store.counts["damaged"] == 1
    assert not path.exists()
    assert "computed again" in caplog.text
    assert store.put(key(1), b"new")
    assert store.get(key(1)) == b"new"


def test_the_least_recently_used_go_beyond_the_limit(tmp_path):
    size = HEAD.size + 1000
    store = PrefixStore(tmp_path, limit=10 * size)
    for n in range(10):
        store.put(key(n), bytes(1000))
        os.utime(store._path(key(n)), (n, n))
    assert store.get(key(0)) is not None  # is now the one that was used last
    store.put(key(10), bytes(1000))
    assert [n for n in range(11) if key(n) in store] == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert store.nbytes == 9 * size == sum(p.stat().st_size for p in files(tmp_path))
    assert store.counts["deleted"] == 2
    again = PrefixStore(tmp_path, limit=10 * size)
    assert again.nbytes == 9 * size
    for _ in range(5):
        again.put(key(10), bytes(1000))  # the same block takes its place once
    assert again.nbytes == 9 * size
    assert not again.put(key(11), bytes(20 * size))
    assert again.counts["failed"] == 1
    assert PrefixStore(tmp_path, limit=5 * size).nbytes <= 5 * size, "of a folder that held more"


def test_a_limit_is_of_the_folder_whoever_writes(tmp_path):
    size = HEAD.size + 1000
    stores = [PrefixStore(tmp_path, limit=32 * size) for _ in range(4)]
    for n in range(200):
        stores[n % 4].put(key(n), bytes(1000))
    held = sum(p.stat().st_size for p in files(tmp_path))
    assert held <= 32 * size * (1 + 4 * prefixes.SHARE)


def test_files_that_may_not_be_deleted_end_nothing(tmp_path, monkeypatch):
    size = HEAD.size + 1000
    store = PrefixStore(tmp_path, limit=4 * size)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prefixes.Path, "unlink", refuse)
    assert all(store.put(key(n), bytes(1000)) for n in range(9))
    assert store.nbytes == 9 * size
    assert PrefixStore(tmp_path, limit=4 * size).nbytes == 9 * size


def test_a_full_disk_costs_nothing_but_the_block(tmp_path, monkeypatch, caplog):
    store = PrefixStore(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prefixes.os, "replace", full)
        assert not store.put(key(1), b"x")
        assert not store.put(key(2), b"x")
    assert caplog.text.count("No space left on device") == 1, "told once"
    assert files(tmp_path) == []
    assert store.put(key(1), b"x")
    assert store.counts["failed"] == 2


def test_a_writer_that_is_killed_leaves_whole_blocks_or_none(tmp_path):
    code = f"""
        from hashlib import sha256
        from kvshrink.serve.prefixes import PrefixStore
        store, n = PrefixStore({str(tmp_path)!r}), 0
        while True:
            store.put(sha256(str(n).encode()).hexdigest(), bytes(1 << 20)); n += 1
            print(n, flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as writer:
        while int(writer.stdout.readline()) < 5:
            pass
        writer.send_signal(signal.SIGKILL)
    store = PrefixStore(tmp_path)
    there = [n for n in range(10000) if key(n) in store]
    assert len(there) >= 5
    assert all(store.get(key(n)) == bytes(1 << 20) for n in there)
    part = tmp_path / "ab" / "tmpx.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"half")
    PrefixStore(tmp_path)
    assert part.exists(), "its writer may be at work"
    os.utime(part, (0, time.time() - 2 * prefixes.ABANDONED))
    PrefixStore(tmp_path)
    assert not part.exists()


def test_folders_and_limits_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot keep prefixes in .*Give another folder"):
        PrefixStore(tmp_path / "file")
    with pytest.raises(SettingError, match="cannot hold 0 bytes"):
        PrefixStore(tmp_path, limit=0)
