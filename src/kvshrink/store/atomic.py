"""Files that are whole or not there at all, also for who reads while they are written and after a kill at any point.

A file is made in a room, a folder of its own beside its place, then synced and renamed. A room is locked by who works
in it, so that the room of a writer that was killed is known as such, and the next writer clears it away.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kvshrink.errors import ArtifactError
from kvshrink.store.lock import free, lock, locked
from kvshrink.store.reason import reason, remedy

Put = Callable[[Path], object]  # writes one file
ROOM = re.compile(r"\.kvshrink-[0-9a-f]{16}\.part")


def write_all(puts: Mapping[Path, Put]) -> None:
    """Write files: none gets its name before all are whole. A link is followed, as by an ordinary write.

    Raises ArtifactError when the disk is full or a path cannot be written; the old files then stay.
    """
    with refusing(puts):
        places = {Path(os.path.realpath(path)): put for path, put in puts.items()}
        with staged(places) as parts:
            for place, part in parts.items():
                part.replace(place)


@contextmanager
def refusing(paths: Mapping[Path, object]) -> Iterator[None]:
    """What goes wrong while these files are written, as one line that names the cause."""
    try:
        yield
    except (OSError, ValueError) as error:
        name = ", ".join(str(path) for path in list(paths)[:2])
        raise ArtifactError(f"cannot write {name}: {reason(error)}. {remedy(error)}") from error


@contextmanager
def staged(puts: Mapping[Path, Put]) -> Iterator[dict[Path, Path]]:
    """{place: part}, all parts whole and synced; they are to be renamed within, under the lock of their folders."""
    with ExitStack() as stack:
        rooms: dict[Path, Path] = {}
        for place in puts:
            if place.parent not in rooms:
                _make(place.parent)
                rooms[place.parent] = stack.enter_context(_room(place.parent))
            _check_free(place)
        parts = {place: rooms[place.parent] / place.name for place in puts}
        for place, part in parts.items():
            puts[place](part)
            part.chmod(_mode(place, part.parent))
            _sync(part)
        for folder in sorted(rooms):
            stack.enter_context(locked(folder))
        yield parts
        for folder in rooms:
            sync_names(folder)


def sync_names(folder: Path) -> None:
    """Make renames in a folder last, where the file system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def _room(folder: Path) -> Iterator[Path]:
    """A new folder in this one, gone afterwards; so are those of writers that were killed."""
    room = folder / f".kvshrink-{secrets.token_hex(8)}.part"
    with locked(folder):  # nobody takes a room for abandoned between its making and its lock
        _sweep(folder)
        room.mkdir()
        fd = os.open(room, os.O_RDONLY)
        lock(fd)
    try:
        yield room
    finally:
        _clear(room)
        os.close(fd)


def _sweep(folder: Path) -> None:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if ROOM.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for name in names:
        with suppress(OSError):
            fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if free(fd):
                    _clear(folder / name)
            finally:
                os.close(fd)


def _clear(room: Path) -> None:
    with suppress(OSError):
        for name in os.listdir(room):
            (room / name).unlink()
        room.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(errno.ENOTDIR, f"{folder} is no folder") from error


def _check_free(place: Path) -> None:
    """Raise OSError if something other than a file is in this place: a rename would take it away."""
    with suppress(FileNotFoundError):
        kind = place.lstat().st_mode
        if stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise OSError(errno.EINVAL, "it is a device or a pipe")


def _mode(place: Path, room: Path) -> int:
    """The mode of the file that is there, or of a new one: a folder's without the right to enter it."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(place.stat().st_mode)
    return room.stat().st_mode & 0o666


def _sync(part: Path) -> None:
    with part.open("rb+") as f:
        os.fsync(f.fileno())
