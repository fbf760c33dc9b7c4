"""Mutated files: one of ours ends in our error, or gives what the honest one gives; nothing crashes or fills memory.

Where the digest was made anew after the change, another result is an honest reading of another file, and allowed. What
is loaded is used: a prompt is fed or a few tokens are decoded. Cases run in a child process, which is replaced when it
dies. Memory is the growth of the child's resident set during a case (VmHWM, set back before it): at most twice what the
honest file takes, and SLACK, which is below what either process holds and above what allocators keep to themselves.
"""

import argparse
import multiprocessing as mp
import os
import signal
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import KVShrinkError
from tests.fuzz import Tally, source
from tests.fuzz.mutations import copied, mutate
from tests.fuzz.subjects import METHODS, Subject, Subjects

SLACK = 32 * 2**20  # bytes
LONGEST = 20  # seconds of a case on a processor, and a hundred times as many in all, since others may be at work


def run(cases: int, seed: int, folder: Path, names: tuple[str, ...] = tuple(METHODS), verbose: bool = False) -> Tally:
    """Try so many cases. Raises nothing: what is wrong is a finding of the tally."""
    warnings.simplefilter("ignore")
    subjects, tally, done = Subjects(folder, names), Tally("files", seed), 0
    context = mp.get_context("fork")
    while done < cases:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(subjects, seed, done, cases, theirs))
        child.start()
        theirs.close()
        while done < cases:
            try:
                if not ours.poll(100 * LONGEST):
                    child.kill()
                outcome, more = ours.recv()
            except EOFError:
                child.join()
                tally.find(done, f"the process died or hung (exit code {child.exitcode})")
                done += 1
                break
            tally.find(done, more.pop("what"), **more) if outcome == "finding" else tally.add(outcome)
            done += 1
            if verbose and done % 500 == 0:
                print(done, dict(tally.outcomes), flush=True)
        child.join()
    return tally


def _work(subjects: Subjects, seed: int, first: int, cases: int, out: Connection) -> None:
    torch.set_num_threads(1)
    room = Path(tempfile.mkdtemp(dir=subjects.folder))
    honest: dict[str, tuple[Any, int]] = {}
    for case in range(first, cases):
        signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)  # ends the process
        random = source("files", seed, case)
        subject = random.choice(subjects.all)
        paths = copied([subjects.folder / f for f in subject.files], room / "case")
        if subject.name not in honest:
            subject.read(room / "case")  # what is made once is made now
            honest[subject.name] = _measured(subject, room / "case")
        done, hashed = mutate(random, subject.kind, paths)
        out.send(_judged(subject, room / "case", done, hashed, *honest[subject.name]))
    out.close()


def _judged(subject: Subject, folder: Path, done: str, hashed: bool, wanted: Any, size: int) -> tuple[str, dict]:
    about = {"subject": subject.name, "change": done, "hashed": hashed}
    result, grown = _measured(subject, folder)
    if grown > 2 * size + SLACK:
        return "finding", {"what": f"{grown >> 20} MiB, and {size >> 20} of the honest file", **about}
    if isinstance(result, KVShrinkError):
        text = str(result)
        return ("our error", {}) if "\n" not in text and 0 < len(text) < 1000 else ("finding", {"what": text, **about})
    if isinstance(result, BaseException):
        return "finding", {"what": f"{type(result).__name__}: {str(result)[:200]}", **about}
    if _same(result, wanted) or (subject.kind == "log" and not hashed and _part(result, wanted)):
        return "the same", {}
    if result is None and subject.kind == "checkpoint":
        return "made again", {}
    return ("another, rightly hashed", {}) if hashed else ("finding", {"what": "another result", **about})


def _measured(subject: Subject, folder: Path) -> tuple[Any, int]:
    """(what reading gives or raises, bytes by which the process grew meanwhile)."""
    before = _resident("VmRSS", reset=True)
    try:
        result = subject.read(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a panic of the reader's own
        result = error
    return result, max(0, _resident("VmHWM") - before)


def _resident(name: str, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) and type(a) is type(b)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def _part(rows: dict, wanted: dict) -> bool:
    """Whether no row of a log says anything else."""
    return all(key in wanted and _same(row, wanted[key]) for key, row in rows.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON with outcomes and findings")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        found = run(args.cases, args.seed, Path(made), verbose=True)
    summary = found.summary() | {"seconds": round(time.perf_counter() - started)}
    print(summary)
    if args.out:
        found.write(args.out)
