"""Text from outside: files that a user names, and Python values written in it."""

import ast
import os
import stat
import warnings
from pathlib import Path

from kvshrink.errors import DataError, KVShrinkError

MOST = 2**30  # bytes; a larger text would take many times as much memory as tokens


def read_text(
    path: str | Path,
    refusal: str = "cannot read text file",
    error: type[KVShrinkError] = DataError,
    remedy: str = "Give a UTF-8 text file.",
) -> str:
    """The text of a UTF-8 file or a pipe. Raises `error`, which begins with `refusal` and the path."""
    try:
        raw = _bytes(path)
        text = raw.decode("utf-8-sig")  # some editors put a mark in front of UTF-8
    except (OSError, ValueError) as reason:  # a path may hold a zero byte
        said = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise error(f"{refusal} {path}: {said}. {remedy}") from reason
    if "\0" in text:
        raise error(f"{refusal} {path}: it holds zero bytes, as binary files and UTF-16 do. {remedy}")
    return text


def _bytes(path: str | Path) -> bytes:
    # a pipe that nobody writes into would else be waited for without end
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        kind = os.fstat(handle)
        if not (stat.S_ISREG(kind.st_mode) or stat.S_ISFIFO(kind.st_mode)):
            raise ValueError("it is a device")
        os.set_blocking(handle, True)
        raw = file.read(MOST + 1)
    if max(len(raw), kind.st_size) > MOST:
        raise ValueError(f"it has more than {MOST} bytes")
    return raw


def literal(text: str) -> object:
    """The number, text, list or the like that is written as in Python. Raises ValueError if there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of doubtful escapes, such as "\\d"
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no value: {type(error).__name__}") from error
