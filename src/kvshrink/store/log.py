"""A log of measurements: a JSON object a line, appended as it comes, read again when a run is resumed.

A line has a digest of its own. One that is damaged, or was written by anything else, is left out, and what it would
have said is measured again.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvshrink.errors import EvalError
from kvshrink.store import files
from kvshrink.store.digest import sealed, unsealed
from kvshrink.store.lock import lock
from kvshrink.store.parse import parsed
from kvshrink.store.reason import reason, remedy

LONGEST = 2**24  # bytes of a line


class Log:
    """A JSONL file of records, found by key; without a path it only remembers."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        rows = () if path is None else _read(path)
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in rows if isinstance(row.get("key"), str)}

    def has(self, key: str, valid: Callable[[dict[str, Any]], object] = lambda row: True) -> bool:
        """Whether there is a record of this key. One that is not as it must be is forgotten, to be made again."""
        if key in self.rows and not valid(self.rows[key]):
            del self.rows[key]
        return key in self.rows

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        if self.path is not None:
            _append(self.path, row)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def key_of(*parts: object) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a line in one piece, also where several processes write; first end one that an interrupt cut off."""
    line = (json.dumps(sealed(row)) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
            lock(fd)
            end = os.lseek(fd, 0, os.SEEK_END)
            if end and os.pread(fd, 1, end - 1) != b"\n":
                line = b"\n" + line
            _write(fd, line, end)
        finally:
            os.close(fd)
    except OSError as error:
        raise EvalError(f"cannot write {path}: {reason(error)}. {remedy(error)}") from error


def _write(fd: int, line: bytes, end: int) -> None:
    """The whole line after byte `end`, or none of it."""
    try:
        done = 0
        while done < len(line):
            done += os.write(fd, line[done:])
    except OSError:
        os.ftruncate(fd, end)
        raise


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with files.opened(path) as f:
            whole = True
            while line := f.readline(LONGEST):
                first, whole = whole, line.endswith(b"\n")
                if first and (row := _row(line)) is not None:
                    yield row
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise EvalError(f"cannot read {path}: {reason(error)}. Choose another folder.") from error


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parsed(line)
    except ValueError:
        return None
    return unsealed(row) if isinstance(row, dict) else None
