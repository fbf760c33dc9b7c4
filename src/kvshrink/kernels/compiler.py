"""The compiler of the C++ kernels: which one, what a build depends on, and runs of it that end when they must."""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


class BuildError(Exception):
    """A compiler that fails, in one line."""


class BuildTimeout(BuildError):
    """A compiler that was ended because it took too long."""


def find() -> list[str]:
    """The command of $CXX, which may have arguments ("ccache g++"), else g++. Raises BuildError if it is not there."""
    asked = os.environ.get("CXX", "").strip() or "g++"
    try:
        command = [asked] if shutil.which(asked) else shlex.split(asked)  # a path may have spaces
    except ValueError as error:
        raise BuildError(f"CXX={asked!r} is not a command ({error})") from None
    found = shutil.which(command[0]) if command else None
    if found is None:
        raise BuildError(f"there is no compiler {asked!r}. Install g++, or set CXX, for the C++ kernels")
    return [found, *command[1:]]


def key(command: Sequence[str], flags: Sequence[str], sources: Sequence[Path]) -> str:
    """Differs where a build would: by the sources, the compiler, its flags, the processor or the C library."""
    tools = [os.stat(found) for word in command if (found := shutil.which(word))]
    told = [(info.st_ino, info.st_size, info.st_mtime_ns) for info in tools]
    files = [(source.name, source.read_bytes()) for source in sources]
    seed = repr((list(command), told, list(flags), platform.machine(), platform.libc_ver(), _processor(), files))
    return hashlib.sha256(seed.encode()).hexdigest()[:16]


def build(command: Sequence[str], flags: Sequence[str], sources: Sequence[Path], made: Path, seconds: float) -> Path:
    """The shared object of these sources, in the empty folder `made`. Raises BuildError."""
    until, objects = time.monotonic() + seconds, []
    for source in (s for s in sources if s.suffix == ".cpp"):
        objects.append(str(made / f"{source.parts[-3]}-{source.stem}.o"))
        _run([*command, *flags, "-fPIC", "-c", str(source), "-o", objects[-1]], made, until)
    # without -fopenmp, which would bring a second OpenMP: its names are found in the one that torch has loaded
    linked = [flag for flag in flags if flag != "-fopenmp"]
    _run([*command, *linked, "-shared", *objects, "-o", str(made / "kernels.so")], made, until)
    return made / "kernels.so"


def _run(command: Sequence[str], made: Path, until: float) -> None:
    log = made / "log"  # not a pipe, which a server that the compiler leaves behind would keep open
    settings = {**os.environ, "TMPDIR": str(made), "LC_ALL": "C"}
    with open(log, "wb") as said:
        try:
            # a session of its own, so that all that the compiler starts can be ended with it
            run = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=settings, start_new_session=True
            )
        except OSError as error:
            raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from None
        try:
            status = run.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise BuildTimeout(f"{shlex.join(command[:1])} took too long and was ended") from None
        finally:
            if run.returncode is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    if status:
        raise BuildError(f"{shlex.join(command[:1])} failed: {_first_error(log.read_text(errors='replace'), status)}")


def _first_error(said: str, status: int) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"status {status}")[:500]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
