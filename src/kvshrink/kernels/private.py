"""Folders and files that code may be loaded from: this user's own, which nobody else can write or swap for another.

A folder is reached from the root down, each part opened beneath the one before and never through a link, so that what
was checked is what is used. Every folder on the way must belong to this user or to the system, and may be written by
others only if it is sticky, as /tmp: others can then put something beside what is ours, but not in its place.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH


def real(path: Path) -> Path:
    """The same folder by a path of no links but perhaps itself: where links among its parents end is what counts."""
    return Path(os.path.realpath(path.parent), path.name)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of this folder, which is made for this user alone where it is not there yet. No part may be a link.

    Raises OSError, in words, if it is not this user's alone.
    """
    at = os.open("/", _flags(parent=True))
    try:
        try:
            for part in path.parts[1:]:
                _check(at, parent=True)
                below = _beneath(at, part, parent=part is not path.parts[-1])
                os.close(at)
                at = below
            _check(at, parent=False)
        except OSError as error:
            raise OSError(f"{path}: {error.strerror or error}") from None
        yield at
    finally:
        os.close(at)


def open_file(folder: int, name: str) -> int:
    """A descriptor of a file in an opened folder. Raises OSError if it is a link, or not this user's alone."""
    found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError("it is not a file")
        _check(found, parent=False)
    except OSError:
        os.close(found)
        raise
    return found


def _beneath(folder: int, name: str, parent: bool) -> int:
    with suppress(FileNotFoundError):
        return os.open(name, _flags(parent), dir_fd=folder)
    with suppress(FileExistsError):  # another process may be as far as this one
        os.mkdir(name, 0o700, dir_fd=folder)
    return os.open(name, _flags(parent), dir_fd=folder)


def _flags(parent: bool) -> int:
    # a parent may be one that this user can pass through but not list
    reading = getattr(os, "O_PATH", os.O_RDONLY) if parent else os.O_RDONLY
    return reading | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _check(found: int, parent: bool) -> None:
    """Raises OSError if others can write it or, of a parent, put something else in the place of what is in it."""
    info = os.fstat(found)
    # in a container the system's folders may belong to a user that has no name inside
    owners = {os.geteuid(), 0, os.stat("/").st_uid} if parent else {os.geteuid()}
    whose = "a folder above it" if parent else "it"
    if info.st_uid not in owners:
        raise OSError(f"{whose} belongs to user {info.st_uid}")
    if info.st_mode & OTHERS and not (parent and info.st_mode & stat.S_ISVTX):
        raise OSError(f"{whose} can be written by others (mode {stat.S_IMODE(info.st_mode):o})")
