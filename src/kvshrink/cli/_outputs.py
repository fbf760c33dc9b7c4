"""Where a command writes: looked at before the work, so that nothing is lost after it, and one run's own.

A folder bears a record of what its command was asked for. The same command goes on in it; any other is refused.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvshrink.errors import ArtifactError, KVShrinkError, SettingError
from kvshrink.eval.report import plots
from kvshrink.store.lock import taken
from kvshrink.store.reason import reason, remedy

RECORD = ".kvshrink-run.json"


@contextmanager
def run_folder(
    folder: Path, asked: Mapping[str, Any], writes: Sequence[str], begun: Sequence[str] = ()
) -> Iterator[None]:
    """The folder is this run's alone while it works.

    asked: what its results depend on. writes: names in the folder, or patterns; begun: those that an interrupted run
    leaves.
    Raises SettingError on a folder with results of something else, or that another run works in, and ArtifactError on
    one that cannot be written.
    """
    wanted = json.loads(json.dumps(asked, default=str))
    with _unwritable(folder):
        new = not folder.exists()
        _look(folder, writes, begun)
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(handle, "r+") as record:
        if taken(handle):
            raise SettingError(f"another run works in {folder} now. Wait for its end, or choose another folder.")
        try:
            text = record.read()
        except UnicodeDecodeError:
            text = "damaged"
        if text:
            _compare(folder, text, wanted)
        else:
            record.write(json.dumps(wanted, indent=1) + "\n")
            record.flush()
        try:
            yield
        finally:
            if not text and not any(_there(folder, name) for name in (*writes, *begun)):
                _forget(folder, new)  # else a slip in the settings would keep the folder from the right ones


def check_file(path: Path) -> None:
    """Raise unless a file can be written there: a new one, or in place of one that is no link, folder or device."""
    with _unwritable(path):
        mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
        if not stat.S_ISREG(mode):
            raise SettingError(f"{path} is a folder, a link or a device. Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent):
            pass


def check_picture(path: Path) -> None:
    """As `check_file`, for a name that says which kind of picture it is."""
    plots.check_ending(path)
    plots.pyplot()  # it may not be installed
    check_file(path)


def digest(path: Path | None, texts: Sequence[str]) -> str:
    """What a record says of a text."""
    return "bundled" if path is None else hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def place(name: str) -> str:
    """A folder however it is written; other names stay as they are."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


@contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except KVShrinkError:
        raise
    except (OSError, ValueError) as error:  # a path may hold a zero byte
        raise ArtifactError(f"cannot write {path}: {reason(error)}. {remedy(error)}") from error


def _forget(folder: Path, new: bool) -> None:
    with suppress(OSError):
        (folder / RECORD).unlink()
        if new:
            folder.rmdir()


def _compare(folder: Path, text: str, wanted: dict) -> None:
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if not isinstance(found, dict):
        raise SettingError(f"{folder / RECORD} is damaged, so what {folder} holds is not known. Choose another folder.")
    differ = [k for k in (*wanted, *(k for k in found if k not in wanted)) if wanted.get(k) != found.get(k)]
    if differ:
        what = "; ".join(f"{k} {found.get(k)!r}, now {wanted.get(k)!r}" for k in differ)
        raise SettingError(f"{folder} holds what was made with other settings: {what}. Choose another folder.")


def _there(folder: Path, name: str) -> list[Path]:
    """Files of a name, or of a pattern, links that lead nowhere among them."""
    if "*" in name:
        return sorted(folder.glob(name))
    return [folder / name] if os.path.lexists(folder / name) else []


def _look(folder: Path, writes: Sequence[str], begun: Sequence[str]) -> None:
    """Raise SettingError if a name that is to be written is a link, or is there though no run left a record."""
    for path in (path for name in (RECORD, *writes, *begun) for path in _there(folder, name)):
        if path.is_symlink():
            raise SettingError(f"{path} is a link, which would be written through. Remove it.")
    there = [path.name for name in writes for path in _there(folder, name)]
    if there and not (folder / RECORD).exists():
        raise SettingError(f"{folder} has {there[0]}, which no run with a record made. Choose another folder.")
