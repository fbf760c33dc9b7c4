"""C++ kernels for CPUs: built once with g++, kept in the user's cache folder, loaded with ctypes. All optional.

Plain C functions, so that a build takes seconds: torch's own headers take minutes. The threads are torch's: the library
is left to find the OpenMP that torch has loaded, since a second pool would fight with the first one for the cores.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fno-trapping-math")
SECONDS = 300  # after which a compiler that hangs is given up

log = logging.getLogger("kvshrink")


@cache
def library() -> ctypes.CDLL | None:
    """The built library; None, said once in the log, where it cannot be built or loaded."""
    if os.environ.get("KVSHRINK_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        log.warning("no g++: decoding runs in plain torch, several times slower. Install g++ for the C++ kernels.")
        return None
    for threads in (("-fopenmp",), ()):  # without OpenMP where torch brings none: one thread is still far faster
        try:
            return _load(compiler, (*FLAGS, *threads))
        except (OSError, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or str(error)
    log.warning("the C++ kernels cannot be built, decoding runs in plain torch, several times slower: %s", told[-2000:])
    return None


def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared object, compiled if this source was not yet by this compiler for this processor."""
    sources = sorted(HERE.glob("*/native/*"))
    seed = hashlib.sha256(repr((compiler, flags, platform.machine(), _processor())).encode())
    for source in sources:
        seed.update(source.read_bytes())
    target = folder() / f"kernels-{seed.hexdigest()[:16]}.so"
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:
            log.warning("%s cannot be loaded (%s) and is built again", target, error)
    log.info("building the C++ kernels, once: %s", target)
    # in a folder of its own until it is whole: another process may build at the same time
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        objects = []
        for source in (s for s in sources if s.suffix == ".cpp"):
            objects.append(str(Path(made) / f"{source.parts[-3]}-{source.stem}.o"))
            _run([compiler, *flags, "-fPIC", "-c", str(source), "-o", objects[-1]])
        # linked without OpenMP's library, see above: its names are found among those that torch has loaded
        _run([compiler, "-shared", *objects, "-o", str(Path(made) / target.name)])
        os.replace(Path(made) / target.name, target)
    return ctypes.CDLL(str(target))


def folder() -> Path:
    """Where built kernels are kept: $KVSHRINK_CACHE, or the user's cache folder, or a temporary one."""
    base = os.environ.get("KVSHRINK_CACHE") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    known = [] if base.startswith("~") else [Path(base) / "kvshrink"]  # a user may have no home
    for path in (*known, Path(tempfile.gettempdir()) / f"kvshrink-{os.getuid()}"):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # code is loaded from here: nobody else may have made it
        if os.access(path, os.W_OK) and path.stat().st_uid == os.getuid():
            return path
    raise OSError("no folder to keep built kernels in. Set KVSHRINK_CACHE to one that can be written.")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
