"""One writer at a time, over threads and processes: an advisory lock that the kernel lets go when its holder dies."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # not POSIX: whoever writes last wins
    fcntl = None  # type: ignore[assignment] # a module to mypy

UNABLE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems cannot lock


def lock(fd: int) -> None:
    """Wait for the open file's lock, which lasts until it is closed. Where there are no locks nothing is waited for."""
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNABLE:
            raise


def free(fd: int) -> bool:
    """Whether nobody else holds the lock; then it is ours. False where that cannot be known."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def taken(fd: int) -> bool:
    """Whether somebody else holds the lock; if not, it is ours. False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in UNABLE
    return False


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[int]:
    """Hold a folder's lock; gives its descriptor. Where a folder cannot be opened (not POSIX), -1."""
    if fcntl is None:
        yield -1
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(fd)
        yield fd
    finally:
        os.close(fd)
