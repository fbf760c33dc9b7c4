"""kernels/native.py: only what this user built and nobody else can touch is loaded; a compiler never hangs a process.

Builds are of a tiny source with our functions in it, so that they take a fraction of a second.
"""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvshrink.kernels import compiler, native, private
from kvshrink.kernels.decode import fused
from tests.kernels.samples import packed

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: decoding runs in plain torch")
SOURCE = 'extern "C" {' + "".join(f"int {name}() {{ return 7; }}" for name in native.FUNCTIONS) + "}"
# a constructor that tells that it ran: a file beside the library
FOREIGN = '#include <fcntl.h>\n__attribute__((constructor)) static void ran() { open("%s", O_CREAT | O_WRONLY, 0600); }'
SLOW = "#!/bin/sh\necho $$ >> {pids}\nsleep 60 & echo $! >> {pids}\nwait\n"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The cache folder of a process that has not built anything yet; and little to build."""
    source = tmp_path / "source" / "op" / "native"
    source.mkdir(parents=True)
    (source / "op.cpp").write_text(SOURCE)
    monkeypatch.setattr(native, "HERE", tmp_path / "source")
    monkeypatch.setattr(native, "FLAGS", ("-O0",))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("KVSHRINK_CACHE", str(tmp_path / "cache"))
    for name in ("CXX", "KVSHRINK_CXXFLAGS", "KVSHRINK_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    native.forget()
    yield tmp_path / "cache" / "kvshrink"
    native.forget()


def libraries(folder) -> list[Path]:
    return sorted(folder.glob("*.so"))


def again():
    native.forget()
    return native.library()


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def counting(tmp_path, monkeypatch) -> Path:
    """A compiler that writes a line for each build, in the file that is returned."""
    calls = tmp_path / "calls"
    calls.touch()
    text = f'#!/bin/sh\ncase "$*" in *-shared*) echo >> {calls};; esac\nexec g++ "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "counting", text))
    return calls


def foreign(path: Path, ran: Path) -> Path:
    """A library of somebody else at this path, which makes the file `ran` where it is loaded."""
    source = path.parent / "foreign.cpp"
    source.write_text(FOREIGN % ran)
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    source.unlink()
    return path


def test_a_build_is_this_users_alone_and_is_kept(fresh, tmp_path, monkeypatch):
    calls = counting(tmp_path, monkeypatch)
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        assert native.library().kvshrink_decode() == 7
    finally:
        os.umask(before)
    (made,) = libraries(fresh)
    assert made.stat().st_mode & 0o777 == 0o600
    assert fresh.stat().st_mode & 0o777 == fresh.parent.stat().st_mode & 0o777 == 0o700
    assert again() is not None
    assert native.why() is None
    assert len(calls.read_text().splitlines()) == 1
    assert not list(fresh.glob(f"{native.BUILDING}*"))


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "group", "world", "link", "folder link"])
def test_a_library_that_is_not_as_built_is_built_again(fresh, tmp_path, damage, caplog):
    assert native.library() is not None
    (made,), ran = libraries(fresh), tmp_path / "ran"
    whole = made.read_bytes()
    if damage == "cut":
        made.write_bytes(whole[:1000])
    elif damage == "changed":
        made.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage in ("group", "world"):
        made.chmod(0o620 if damage == "group" else 0o602)
    else:
        made.unlink()
        other = foreign(tmp_path / "other.so", ran)
        if damage == "foreign":
            shutil.copy(other, made)
        elif damage == "link":
            made.symlink_to(other)
        else:  # of the right name and content, elsewhere
            (tmp_path / "same.so").write_bytes(whole)
            made.symlink_to(tmp_path / "same.so")
    assert again().kvshrink_decode() == 7
    assert not ran.exists()
    assert "is built again" in caplog.text
    (made,) = libraries(fresh)
    assert made.stat().st_mode & 0o777 == 0o600
    assert not made.is_symlink()


def test_a_library_of_another_owner_is_built_again(fresh, caplog):
    if os.geteuid():
        pytest.skip("only root can give files away")
    assert native.library() is not None
    (made,) = libraries(fresh)
    os.chown(made, 65534, 65534)
    assert again() is not None
    assert libraries(fresh)[0].stat().st_uid == 0
    assert "belongs to user 65534" in caplog.text


def test_a_whole_library_without_our_functions_is_built_again(fresh, tmp_path, caplog):
    assert native.library() is not None
    (made,) = libraries(fresh)
    prefix = made.name.rsplit("-", 1)[0]
    made.unlink()
    other = foreign(tmp_path / "other.so", tmp_path / "ran")
    other.chmod(0o600)
    other.rename(fresh / f"{prefix}-{native._digest(other.read_bytes())}.so")
    assert again().kvshrink_decode() == 7
    assert "has not our functions" in caplog.text
    assert len(libraries(fresh)) == 1


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_that_others_can_write_is_not_used(fresh, tmp_path, which, mode, caplog):
    fresh.mkdir(parents=True)
    refused = fresh if which == "folder" else fresh.parent
    refused.chmod(mode)
    ran = tmp_path / "ran"
    assert native.library() is not None
    sticky = which == "parent" and mode == 0o1777  # as /tmp: nobody can move what is ours
    assert bool(libraries(fresh)) == sticky
    if not sticky:
        assert [record.message for record in caplog.records if "can be written by others" in record.message]
        assert len(caplog.records) == 1
        assert libraries(tmp_path / f"kvshrink-{os.geteuid()}")
    assert not ran.exists()


def test_a_folder_that_is_a_link_is_not_used(fresh, tmp_path, caplog):
    fresh.parent.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    fresh.symlink_to(tmp_path / "elsewhere")
    assert native.library() is not None
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(caplog.records) == 1


def test_a_link_above_the_folder_is_followed_and_what_it_leads_to_checked(fresh, tmp_path, monkeypatch):
    """As home folders on another disk are."""
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("KVSHRINK_CACHE", str(tmp_path / "link"))
    assert native.library() is not None
    assert libraries(tmp_path / "disk" / "kvshrink")
    (tmp_path / "disk").chmod(0o777)
    assert again() is not None
    assert libraries(tmp_path / f"kvshrink-{os.geteuid()}")


def test_a_folder_of_another_owner_is_not_used(fresh, caplog):
    if os.geteuid():
        pytest.skip("only root can give folders away")
    fresh.mkdir(parents=True)
    os.chown(fresh, 65534, 65534)
    assert native.library() is not None
    assert not libraries(fresh)
    assert "belongs to user 65534" in caplog.text


def test_what_was_checked_is_what_is_loaded(fresh, tmp_path, monkeypatch):
    """Even where a file is swapped between the two."""
    assert native.library() is not None
    # elsewhere, since a process loads a path only once
    monkeypatch.setenv("KVSHRINK_CACHE", str(fresh.parent.rename(tmp_path / "moved")))
    (made,), ran = libraries(tmp_path / "moved" / "kvshrink"), tmp_path / "ran"
    other, real = foreign(tmp_path / "other.so", ran), native._digest

    def swapping(content):
        shutil.copy(other, tmp_path / "copy.so")
        os.replace(tmp_path / "copy.so", made)
        return real(content)

    monkeypatch.setattr(native, "_digest", swapping)
    assert again().kvshrink_decode() == 7
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["relative", "home", "empty", "file", "below a file", "missing", "long", "no home"])
def test_cache_folders_of_every_kind(fresh, tmp_path, monkeypatch, kind, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    temporary = tmp_path / f"kvshrink-{os.geteuid()}"
    asked, where = {
        "relative": ("some/where", tmp_path / "some" / "where" / "kvshrink"),
        "home": ("~/mine", tmp_path / "home" / "mine" / "kvshrink"),
        "empty": ("", tmp_path / "home" / ".cache" / "kvshrink"),
        "file": ("file", temporary),
        "below a file": ("file/below", temporary),
        "missing": ("/proc/nothing/here", temporary),
        "long": ("/" + "x" * 300, temporary),
        "no home": ("", temporary),
    }[kind]
    monkeypatch.setenv("KVSHRINK_CACHE", asked)
    if kind == "no home":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert native.library() is not None
    assert libraries(where)
    assert len(caplog.records) == (kind in ("file", "below a file", "missing", "long"))


def test_no_folder_at_all(fresh, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVSHRINK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert native.library() is None
    assert "Set KVSHRINK_CACHE" in native.why()


def test_folders_are_opened_beneath_each_other(tmp_path):
    with private.opened(tmp_path / "a" / "b" / "b") as at:
        assert os.path.samestat(os.fstat(at), (tmp_path / "a" / "b" / "b").stat())
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b")
    for path in (tmp_path / "a" / "link", tmp_path / "a" / "link" / "b"):
        with pytest.raises(OSError, match="link"), private.opened(path):
            pass
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before


@pytest.mark.parametrize("cxx", ["g++ -O2", "env g++", "  ", "'{folder}/my tools/g++'", "{folder}/my tools/g++"])
def test_compilers_with_arguments_and_spaces(fresh, tmp_path, monkeypatch, cxx):
    (tmp_path / "my tools").mkdir()
    (tmp_path / "my tools" / "g++").symlink_to(shutil.which("g++"))
    monkeypatch.setenv("CXX", cxx.format(folder=tmp_path))
    assert native.library() is not None


@pytest.mark.parametrize("cxx", ["no-such-compiler", "/no/such -O2", "'unclosed", "''"])
def test_without_a_compiler_it_says_so_once_and_goes_on(fresh, monkeypatch, caplog, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert native.library() is None
    assert native.library() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert cxx in native.why()
    assert native.why() in record.message
    assert "\n" not in record.message
    assert fused(torch.device("cpu"), *[packed("raw", 1, 8, 1, 1, torch.float32)] * 2) == (None, "no C++ compiler")


def test_left_out_it_says_nothing(fresh, monkeypatch, caplog):
    monkeypatch.setenv("KVSHRINK_NATIVE", "0")
    assert native.library() is None
    assert native.why() == "KVSHRINK_NATIVE=0"
    assert not caplog.records


def test_a_build_that_fails_says_why_in_one_line(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    assert native.library() is None
    (record,) = caplog.records
    assert "no-such-flag" in record.message
    assert "\n" not in record.message
    assert not list(fresh.glob(f"{native.BUILDING}*"))


def test_what_a_compiler_makes_must_have_our_functions(fresh, tmp_path, caplog):
    (tmp_path / "source" / "op" / "native" / "op.cpp").write_text("int nothing;")
    assert native.library() is None
    assert "cannot be used" in native.why()


def test_without_openmp_it_is_built_without_threads(fresh, tmp_path, monkeypatch):
    text = '#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP here >&2; exit 1;; esac\nexec g++ "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "plain", text))
    assert native.library() is not None


def test_sources_headers_compilers_and_flags_are_told_apart(fresh, tmp_path, monkeypatch):
    header = tmp_path / "source" / "op" / "native" / "op.h"
    header.write_text("// one")
    names = set()

    def built() -> int:
        assert again() is not None
        names.update(path.name for path in libraries(fresh))
        return len(names)

    assert built() == 1
    header.write_text("// two")
    assert built() == 2
    monkeypatch.setenv("KVSHRINK_CXXFLAGS", "-O1 -DSOME='a b'")
    assert built() == 3
    monkeypatch.setenv("CXX", script(tmp_path / "mine", '#!/bin/sh\nexec g++ "$@"\n'))
    assert built() == 4
    script(tmp_path / "mine", '#!/bin/sh\nexec g++  "$@"\n')
    assert built() == 5
    assert built() == 5


def gone(pids: Path) -> bool:
    """Whether all these processes end soon."""
    for _ in range(100):
        alive = [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}/stat").exists()]
        alive = [pid for pid in alive if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_a_compiler_that_hangs_is_ended_with_all_it_started_and_not_tried_again(fresh, tmp_path, monkeypatch, caplog):
    pids = tmp_path / "pids"
    monkeypatch.setenv("CXX", script(tmp_path / "slow", SLOW.format(pids=shlex.quote(str(pids)))))
    monkeypatch.setattr(native, "SECONDS", 0.5)
    started = time.monotonic()
    assert native.library() is None
    assert time.monotonic() - started < 5
    assert "took too long" in native.why()
    assert len(pids.read_text().split()) == 2
    assert gone(pids)
    assert len(caplog.records) == 1
    assert not list(fresh.glob(f"{native.BUILDING}*"))


def test_a_server_that_a_compiler_leaves_behind_holds_nothing_up(fresh, tmp_path, monkeypatch):
    text = '#!/bin/sh\nsleep 20 &\necho $! >> {pids}\nexec g++ "$@"\n'.format(pids=tmp_path / "pids")
    monkeypatch.setenv("CXX", script(tmp_path / "server", text))
    started = time.monotonic()
    assert native.library() is not None
    assert time.monotonic() - started < 10
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


def test_an_interrupt_ends_the_compiler(fresh, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    monkeypatch.setenv("CXX", script(tmp_path / "slow", SLOW.format(pids=shlex.quote(str(pids)))))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        native.library()
    timer.join()
    assert gone(pids)
    assert not list(fresh.glob(f"{native.BUILDING}*"))
    monkeypatch.delenv("CXX")
    assert native.library() is not None


def test_threads_build_once(fresh, tmp_path, monkeypatch):
    calls = counting(tmp_path, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: native.library(), range(4)))
    assert found[0] is not None
    assert all(library is found[0] for library in found)
    assert len(calls.read_text().splitlines()) == 1


ALONE = """
import sys, types
from pathlib import Path
package = sys.modules["kvshrink"] = types.ModuleType("kvshrink")  # without all that it imports
package.__path__ = [sys.argv[2]]
from kvshrink.kernels import native
native.HERE, native.FLAGS = Path(sys.argv[1]), ("-O0",)
print(native.library().kvshrink_decode(), flush=True)
"""


def test_processes_build_once(fresh, tmp_path, monkeypatch):
    calls = counting(tmp_path, monkeypatch)
    asks = [sys.executable, "-c", ALONE, str(tmp_path / "source"), str(Path(native.__file__).parents[1])]
    runs = [subprocess.Popen(asks, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["7"] * 3
    assert len(calls.read_text().splitlines()) == 1


def test_another_process_is_not_waited_for_for_ever(fresh, monkeypatch):
    fresh.mkdir(parents=True, mode=0o700)
    fresh.parent.chmod(0o700)
    monkeypatch.setattr(native, "SECONDS", 0.5)
    with native.FileLock(fresh / "lock"):
        assert native.library() is None
    assert "another process" in native.why()


def test_folders_of_dead_builds_go_with_the_next_one(fresh):
    left = fresh / f"{native.BUILDING}dead"
    left.mkdir(parents=True)
    (left / "half.o").touch()
    fresh.chmod(0o700)
    fresh.parent.chmod(0o700)
    assert native.library() is not None
    assert not left.exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_process_that_was_building_does_not_wait_for_it(fresh):
    with native._looking:
        child = os.fork()
        if child == 0:
            os._exit(0 if native.library() is not None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_first_errors_are_found():
    assert compiler._first_error("note\nx.cpp:1: error: bad\nmore errors", 1) == "x.cpp:1: error: bad"
    assert compiler._first_error("\n", 4) == "status 4"
