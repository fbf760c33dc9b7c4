"""Blocks of a prefix cache in a folder: a file a block, whole or not there; beyond a size the least recently used go.

A file is a cache, not an archive: what is damaged, cut short, of another format or of another name is deleted and taken
as not there, and what cannot be written is let go. Any number of processes may share a folder. So a block is written
without store/atomic.py, which syncs each file to the disk under a lock: the digest says what a crash left of it.
"""

import hashlib
import logging
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvshrink.errors import SettingError
from kvshrink.store.reason import reason

log = logging.getLogger(__name__)
MAGIC, VERSION = b"kvshrink-block\n\0", 1
HEAD = struct.Struct("<16sIQ32s")  # magic, format version, bytes of the content, digest of name and content
KEY = re.compile(r"[0-9a-f]{64}")
PART = ".part"  # ending of a file that is being written
ABANDONED = 600  # seconds after which such a file's writer is taken to be gone
SHARE = 1 / 16  # of the size allowed that a process writes before it looks again at what others wrote
SPARE = 0.9  # of the size allowed is what stays after files were deleted


class Entry(NamedTuple):
    used: float  # when it was last read or written, seconds
    size: int
    path: Path


class PrefixStore:
    """limit: bytes of all files together, headers included; None: no limit."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise SettingError(f"a prefix store cannot hold {limit} bytes. Give a size above 0, or none.")
        self.folder, self.limit = Path(folder).expanduser(), limit
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise SettingError(
                f"cannot keep prefixes in {self.folder}: {reason(error)}. Give another folder."
            ) from error
        self.counts = dict.fromkeys(
            ("hits", "misses", "damaged", "deleted", "failed", "bytes_read", "bytes_written"), 0
        )
        self._lock, self._told, self._written = threading.Lock(), False, 0
        self._bytes = sum(entry.size for entry in self._entries())
        if limit is not None and self._bytes > limit:  # it was more before
            self._shrink(limit)

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def get(self, key: str) -> bytes | None:
        """The content; None if there is none that is whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            self._count(misses=1)
            return None
        content = _checked(key, data)
        if content is None:
            log.warning("kvshrink: %s is damaged or of another version. It is deleted and computed again.", path)
            self._delete(path, len(data))
            self._count(misses=1, damaged=1)
            return None
        with suppress(OSError):
            os.utime(path)
        self._count(hits=1, bytes_read=len(data))
        return content

    def put(self, key: str, content: bytes) -> bool:
        """Keep a block; whether it is there now. A disk that is full is told once, and costs nothing else."""
        path, data = self._path(key), _sealed(key, content)
        if self.limit is not None and len(data) > self.limit:
            self._fail(f"a block of {len(data)} bytes is larger than the limit of {self.limit}")
            return False
        before = 0
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with suppress(FileNotFoundError):
                before = path.stat().st_size
            fd, part = tempfile.mkstemp(suffix=PART, dir=path.parent)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                os.replace(part, path)  # who reads sees all of it, or none
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._fail(reason(error))
            return False
        self._count(bytes_written=len(data))
        with self._lock:
            self._bytes, self._written = self._bytes + len(data) - before, self._written + len(data)
            if self.limit is not None and (self._bytes > self.limit or self._written > self.limit * SHARE):
                self._shrink(self.limit)  # what other processes wrote counts too
        return True

    def drop(self, key: str) -> None:
        """Delete a block that is whole but of no use."""
        with suppress(OSError):
            self._delete(self._path(key), self._path(key).stat().st_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, as far as this process knows."""
        return self._bytes

    def _shrink(self, limit: int) -> None:
        """Delete what was used longest ago; other processes may do the same."""
        entries, self._written = sorted(self._entries()), 0
        self._bytes = sum(entry.size for entry in entries)
        if self._bytes <= limit:
            return
        for entry in entries:
            if self._bytes <= limit * SPARE:
                return
            try:
                entry.path.unlink()
            except FileNotFoundError:  # another process did the same
                pass
            except OSError:  # another user's
                continue
            else:
                self.counts["deleted"] += 1
            self._bytes -= entry.size

    def _entries(self) -> Iterator[Entry]:
        """Of all blocks; what killed writers left is deleted."""
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(OSError):
                found = path.stat()
                if KEY.fullmatch(path.name):
                    yield Entry(found.st_mtime, found.st_size, path)
                elif path.suffix == PART and time.time() - found.st_mtime > ABANDONED:
                    path.unlink()

    def _delete(self, path: Path, size: int) -> None:
        with suppress(OSError):
            path.unlink()
            with self._lock:
                self._bytes -= size

    def _path(self, key: str) -> Path:
        assert KEY.fullmatch(key), f"{key!r:.80} is no SHA-256 in hexadecimal"
        return self.folder / key[:2] / key

    def _fail(self, why: str) -> None:
        self._count(failed=1)
        if not self._told:
            self._told = True
            log.warning("kvshrink: blocks are not kept in %s: %s.", self.folder, why)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, n in more.items():
                self.counts[name] += n


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


def _sealed(key: str, content: bytes) -> bytes:
    return HEAD.pack(MAGIC, VERSION, len(content), _digest(key, content)) + content


def _checked(key: str, data: bytes) -> bytes | None:
    if len(data) < HEAD.size:
        return None
    magic, version, size, digest = HEAD.unpack_from(data)
    content = data[HEAD.size :]
    whole = (magic, version, size) == (MAGIC, VERSION, len(content))
    return content if whole and digest == _digest(key, content) else None
