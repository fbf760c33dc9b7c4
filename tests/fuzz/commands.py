"""Command lines, good ones and ones with a few things wrong, over all commands and options.

The rule: exit 0, or exit 2 with one line on stderr that names no bug; nothing that was there before is changed. A bar
of progress is no line: it begins with a carriage return. With --json and exit 0 the last line of stdout is an object.

    python -m tests.fuzz.commands --cases 2000 --out bench/results/fuzz_commands.json
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported

import torch
import typer.main

from kvshrink import cli
from tests.fuzz import Tally, source, words, world

CPU, WALL = 60, 600  # seconds; a command that takes more of one is a finding
FOREIGN = 0.05  # share of options that are taken from any command


class Late(BaseException):
    """A command does not end."""


class World:
    """The folder that commands run beside: what is in it may not change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = {name: root / name for name in ("M", "B", "T", "A", "P", "C")}
        world.model(self.paths["M"])
        self.paths["B"].mkdir()
        world.broken_models(self.paths["M"], self.paths["B"])
        world.texts(self.paths["T"])
        (self.paths["P"] / "full").mkdir(parents=True)
        for name in ("results.json", "kvshrink.json", "accuracy.png", "outcomes.jsonl", "letter.txt"):
            (self.paths["P"] / "full" / name).write_text("mine\n")
        (root / "P.txt").write_text("mine\n")
        here = Path.cwd()
        os.chdir(root)
        for line in (
            "fit --model M --text T/good.txt --length 128 --method cskv:keep=0.5,window=16 --out A",
            f"plan --model M {words.QUICK['plan'].replace('rtn', 'cskv')} --out plan.json",
        ):
            code, _, err = called(line.split())
            assert code == 0, err
        os.chdir(here)
        shutil.copytree(self.paths["A"], self.paths["C"])
        weights = self.paths["C"] / "kvshrink.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        self.before = world.snapshot(root)

    def resolved(self, text: str) -> str:
        """The text with the world's folders in it."""
        for name in [*self.paths, "P.txt", "plan.json"]:
            for form in (name, f"{name}/"):
                if text == form or (form[-1] == "/" and text.startswith(form)):
                    return str(self.root / text)
        return text.replace("=T/", f"={self.root}/T/").replace("=T,", f"={self.root}/T,")


@cache
def known(command: str) -> list[str]:
    """The options of a command."""
    found = typer.main.get_command(cli.app)
    for name in command.split():
        found = found.commands[name]
    return [name for p in found.params for name in p.opts if name.startswith("--")]


def line(random: random.Random, w: World) -> list[str]:
    """A command line: a quick good one, changed in up to three places."""
    command = random.choices(list(words.QUICK), [words.SELDOM.get(name, 10) for name in words.QUICK])[0]
    if command == "lm-eval":
        return [command, *random.choice(words.SLOW if random.random() < 0.1 else words.HARNESS).split()]
    good = words.QUICK[command].split()
    options = dict(zip(good[::2], good[1::2], strict=True))
    if command not in ("report", "demo"):
        options["--model"] = "M"
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        option = random.choice(words.OPTIONS if random.random() < FOREIGN else known(command))
        if option in options and option != "--model" and random.random() < 0.15:
            del options[option]
        else:
            options[option] = random.choice(words.VALUES.get(option, words.NUMBERS))
    if random.random() < 0.3:
        options["--json"] = ""
    if command == "demo":
        options["--cases"] = "0"  # it is for the bundled model alone, and takes minutes
    found = [*command.split(), *([w.resolved(random.choice(words.REPORTED))] if command == "report" else [])]
    for option, value in options.items():
        found += [option] if option in words.FLAGS else [option, w.resolved(value)]
    if random.random() < 0.05:
        found.insert(random.randrange(len(found) + 1), random.choice(words.TEXTS))
    return found


def called(given: list[str]) -> tuple[int | str, str, str]:
    """(exit code, or what came out instead; stdout; stderr) of the program in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    argv, sys.argv = sys.argv, ["kvshrink", *given]
    code: int | str = "no exit"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else str(stop.code)
    except Exception as error:
        code = repr(error)
    finally:
        sys.argv = argv
    return code, *(x.buffer.getvalue().decode("utf-8", "replace") for x in (out, err))


def judged(given: list[str], code: int | str, out: str, err: str) -> str | None:
    """What breaks the rule, or None."""
    lines = [x for x in err.split("\n") if x.strip() and "\r" not in x]
    if "Traceback" in err:
        return "traceback"
    if code == 0:
        if "--json" in given and "--help" not in given and not _is_object(out):
            return "the last line is no JSON object"
        return None
    if code != 2:
        return f"exit {code}"
    if lines and "this is a bug" in lines[-1]:
        return lines[-1]
    if not lines or not lines[-1].startswith("kvshrink: "):
        return "no line"
    return None if len(lines) == 1 or given[0] == "lm-eval" else f"{len(lines)} lines"


def _is_object(out: str) -> bool:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        return isinstance(json.loads(out.splitlines()[-1], parse_constant=refuse), dict)
    except (ValueError, IndexError):
        return False


def run(cases: int, seed: int, root: Path, first: int = 0) -> Tally:
    """Try so many command lines in a folder."""
    tally, w = Tally("commands", seed), World(root)
    signal.signal(signal.SIGPROF, _late)
    signal.signal(signal.SIGALRM, _late)
    for case in range(first, first + cases):
        given = line(source("commands", seed, case), w)
        started = time.process_time()
        what, outcome, err = _tried(given, w)
        if what is None:
            tally.add(outcome)
        else:
            seconds = round(time.process_time() - started, 1)
            tally.find(case, what, words=[x[:400] for x in given], stderr=err[-600:], seconds=seconds)
    return tally


def _tried(given: list[str], w: World) -> tuple[str | None, str, str]:
    """(what breaks the rule, exit code, stderr) of a command line in a folder of its own, beside the world."""
    here, place = Path.cwd(), Path(tempfile.mkdtemp(prefix="run-", dir=w.root.parent))
    (place / "link").symlink_to(w.paths["P"])
    (place / "link.png").symlink_to(w.root / "P.txt")
    (place / "d.png").mkdir()
    (place / "used").mkdir()
    (place / "used" / ".kvshrink-run.json").write_text('{"command": "other"}\n')
    os.chdir(place)
    signal.setitimer(signal.ITIMER_PROF, CPU)
    signal.alarm(WALL)
    try:
        code, out, err = called(given)
        what = judged(given, code, out, err)
    except Late:
        code, err, what = "late", "", "no end"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        os.chdir(here)
        shutil.rmtree(place)
    after = world.snapshot(w.root)
    changed = [name for name, found in w.before.items() if after.get(name) != found]
    w.before = after
    return what or (f"changed {', '.join(changed)}" if changed else None), f"exit {code}", err


def _late(*_: object) -> None:
    raise Late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tally = run(args.cases, args.seed, Path(folder) / "world", args.first)
    for found in tally.findings:
        print(json.dumps(found, ensure_ascii=True))
    print(json.dumps(tally.summary()["outcomes"]))
    if args.out:
        tally.write(args.out)


if __name__ == "__main__":
    main()
