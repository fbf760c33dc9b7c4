"""C++ kernels for CPUs: built once with g++, kept in a folder of this user's alone, loaded with ctypes. All optional.

Plain C functions, so that a build takes seconds: torch's own headers take minutes. The threads are torch's: the library
is left to find the OpenMP that torch has loaded, since a second pool would fight with the first one for the cores.

A built library has its own digest in its name, so that one that was cut off or changed is never loaded.
KVSHRINK_NATIVE=0 leaves the kernels out; KVSHRINK_CXXFLAGS adds flags to the build.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from kvshrink.kernels import compiler, private

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fno-trapping-math")
SECONDS = 300  # after which a compiler that hangs is ended, and no longer waited for in another process
NAMES = ("decode", "prepare", "forget", "trellis", "mixed", "held", "round", "unround", "mass", "load", "nearest")
FUNCTIONS = tuple(f"kvshrink_{name}" for name in NAMES)
BUILDING = "building-"  # how folders of builds begin

log = logging.getLogger("kvshrink")


class _Answer(NamedTuple):
    library: ctypes.CDLL | None
    why: str | None


_answer: _Answer | None = None
_looking = threading.Lock()


def left_out() -> bool:
    """Whether KVSHRINK_REFERENCE=1 in the environment leaves all kernels out, asked at each use."""
    return os.environ.get("KVSHRINK_REFERENCE") == "1"


def library() -> ctypes.CDLL | None:
    """The built library; None, said once in the log, where it cannot be built or loaded."""
    return (_answer or _ask()).library


def why() -> str | None:
    """Why there is no library, in one line; None if there is one."""
    return (_answer or _ask()).why


def forget() -> None:
    """The next call looks, and builds, again."""
    global _answer
    _answer = None


library.cache_clear = forget  # type: ignore[attr-defined] # as functools.cache has it


def _ask() -> _Answer:
    global _answer
    with _looking:  # two threads must not build at once
        if _answer is None:
            _answer = _look()
        return _answer


def _after_fork() -> None:
    global _looking
    _looking = threading.Lock()  # the thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _look() -> _Answer:
    if os.environ.get("KVSHRINK_NATIVE") == "0":
        return _Answer(None, "KVSHRINK_NATIVE=0")
    try:
        if os.name != "posix":
            raise OSError(f"they are not built on {os.name}")
        command, where = compiler.find(), folder()
        more = tuple(shlex.split(os.environ.get("KVSHRINK_CXXFLAGS", "")))
        try:
            return _Answer(_library(where, command, (*FLAGS, "-fopenmp", *more)), None)
        except compiler.BuildTimeout:
            raise
        except (OSError, compiler.BuildError):
            # where torch brings no OpenMP: one thread is still far faster
            return _Answer(_library(where, command, (*FLAGS, *more)), None)
    except (OSError, ValueError, compiler.BuildError) as error:
        log.warning("no C++ kernels, decoding runs in plain torch, several times slower: %s.", error)
        return _Answer(None, str(error))


def folder() -> Path:
    """Where built kernels are kept: in $KVSHRINK_CACHE, else the user's cache folder, or else in a temporary one.

    Raises OSError if none of them is this user's alone.
    """
    asked = os.environ.get("KVSHRINK_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    base = os.path.expanduser(asked)
    known = [] if base.startswith("~") else [Path(base, "kvshrink")]  # a user may have no home
    for path in (*known, Path(tempfile.gettempdir(), f"kvshrink-{os.geteuid()}")):
        path = private.real(path)
        try:
            with private.opened(path):
                if os.access(path, os.W_OK):
                    return path
            raise OSError(f"{path}: it is read-only")
        except OSError as error:
            log.warning("not used for built kernels: %s.", error)
    raise OSError("no folder to keep built kernels in. Set KVSHRINK_CACHE to one that only you can write")


def _library(where: Path, command: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL:
    """The library of these sources, built if it was not yet. Raises OSError if it cannot be loaded, and BuildError."""
    sources = sorted(path for path in HERE.glob("*/native/*") if path.suffix in (".h", ".cpp"))
    prefix = f"kernels-{compiler.key(command, flags, sources)}-"
    with private.opened(where) as at:
        if (found := _kept(at, where, prefix)) is not None:
            return found
        try:
            with FileLock(where / "lock", timeout=SECONDS, mode=0o600):
                # another process may have built it while this one waited
                if (found := _kept(at, where, prefix, clear=True)) is None:
                    _build(where, prefix, command, flags, sources)
                    found = _kept(at, where, prefix)
        except Timeout:
            raise compiler.BuildTimeout(f"another process has been building in {where} for {SECONDS} seconds") from None
    if found is None:
        raise compiler.BuildError(f"what {command[0]} builds cannot be used")
    return found


def _build(where: Path, prefix: str, command: Sequence[str], flags: Sequence[str], sources: Sequence[Path]) -> None:
    log.info("building the C++ kernels, once, in %s", where)
    for left in where.glob(f"{BUILDING}*"):  # by a process that was killed: only one builds at a time
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=where, ignore_cleanup_errors=True) as folder:
        made = compiler.build(command, flags, sources, Path(folder), SECONDS)
        made.chmod(0o600)
        os.replace(made, where / f"{prefix}{_digest(made.read_bytes())}.so")


def _kept(at: int, where: Path, prefix: str, clear: bool = False) -> ctypes.CDLL | None:
    """The library of this name in an opened folder, if there is a sound one. clear: those that are not are removed."""
    for name in sorted(os.listdir(at)):
        if name.startswith(prefix) and name.endswith(".so"):
            try:
                return _loaded(at, where, name)
            except _UnsoundError as error:
                if clear:
                    log.warning("%s is built again: %s.", where / name, error)
                    os.unlink(name, dir_fd=at)
    return None


class _UnsoundError(Exception):
    """A library that is not as we built it."""


def _loaded(at: int, where: Path, name: str) -> ctypes.CDLL:
    """Raises _UnsoundError, or OSError if a sound one cannot be loaded."""
    try:
        found = private.open_file(at, name)
    except OSError as error:
        raise _UnsoundError(error.strerror or error) from None
    with open(found, "rb", closefd=False) as file:
        if not name.endswith(f"-{_digest(file.read())}.so"):
            os.close(found)
            raise _UnsoundError("it is cut off or changed")
    # through the descriptor, so that what was checked is what is loaded. It stays open: the loader takes a second
    # library of one name for the first
    own = f"/proc/self/fd/{found}"
    library = ctypes.CDLL(own if os.path.exists(own) else str(where / name))
    if not all(hasattr(library, function) for function in FUNCTIONS):
        raise _UnsoundError("it has not our functions")
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
