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
from pathlib import Path

import torch

from kvshrink import cli
from tests.fuzz import Tally, source, world

SECONDS = 120  # a command that takes longer is a finding
LONG = "x" * 300
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "",
    "abc",
    "9" * 5000,
    str(2**31),
    str(2**63),
]
NUMBERS += ["1e9", "0x10", "1_0", " 7", "\u0664", "True", "None", "-0.0", "1e-320"]
TEXTS = [
    "",
    " ",
    ",",
    ",,",
    "[bold]x[/bold]",
    "[/]",
    ":smile:",
    "a\nb",
    "\udcff",
    "\U0001f600",
    LONG,
    "--",
    "-",
    "%s",
    "{}",
    "\x1b[31m",
]
METHODS = [
    *(
        "cskv",
        "rtn",
        "rtn:bits=4",
        "cskv:keep=0.5,bits=4,window=16",
        "streaming_llm",
        "kivi",
        "spectral:kept=0.3",
        "full",
        "zeros",
    ),
    *(
        "cskv:codec=4",
        "rtn:bits=four",
        "streaming_llm:sinks=1e9",
        "cskv:keep=nan",
        "cskv:keep=inf",
        "rtn:group=0",
        "rtn:window=-1",
    ),
    *(
        "cskv:codec=True",
        "cskv:codec={'a': 1}",
        "cskv:keep=[[1]]",
        "cskv:keep=(0.5",
        "cskv:codec='rtn",
        "rtn:bits=4,bits=4",
    ),
    *(
        "cskv:",
        "cskv:=",
        "cskv:=3",
        "cskv:keep",
        "cskv:,,",
        "cskv:keep=",
        ":",
        ":keep=1",
        "cskv:keep=" + "-" * 9000 + "1",
        "(" * 9000,
    ),
    *(
        "rtn:bits=2.0",
        "rtn:bits=1e400",
        "rtn:window=1e9",
        "rtn:window=4611686018427387904",
        "nope",
        "cskvv",
        "cskv:kep=1",
    ),
    *(
        "streaming_llm:like=cskv",
        "streaming_llm:like=",
        "streaming_llm:like=nope",
        "cskv:widths=(1,2)",
        "spectral:widths=[1,2,4]",
    ),
    *(
        "cskv:steps=-1",
        "cskv:init=7",
        "cskv:lr=nan,steps=1",
        "cskv:rank=b'x'",
        "cskv:group_heads=...",
        "rtn:sinks=\u0663",
        "cskv:keep=1e-300",
    ),
]
TASKS = [
    *(
        "passkey",
        "longeval:lines=4",
        "longeval:official=False,lines=3",
        "copy",
        "needle:depth=0.5",
        "kv_retrieval",
        "scbench_like:turns=2",
    ),
    *(
        "passkey:tokens=200",
        "longeval:lines=0",
        "longeval:lines=1.5",
        "longeval:lines=None",
        "longeval:official=3",
        "needle:depth=nan",
    ),
    *(
        "needle:depth='x'",
        "passkey:filler=noise,tokens=1000000000000",
        "passkey:path=3",
        "passkey:path=/dev/zero",
        "ruler:task=3",
        "ruler:task=vt",
    ),
    *(
        "scbench_like:turns=100000000",
        "scbench_like:turns=True",
        "graphwalks:hops=9",
        "longbench",
        "longbench:path=T/rows.jsonl",
        "babilong:path=T",
    ),
    *(
        "longbench_v2:path=T/rows.jsonl",
        "loogle:path=T/rows.jsonl",
        "scbench:path=T/rows.jsonl",
        "lveval:path=T/deep.json",
        "ruler:task=qa_1,path=T/deep.json",
    ),
    *(
        "longeval:path=T/rows.jsonl",
        "longeval_topics:path=T/deep.json",
        "passkey:path=T/short.txt",
        "passkey:path=T/wide.txt",
        "babi_books:story=qa9",
    ),
    *(
        "passkey:count=3",
        "passkey:seed=3",
        "passkey:n=3",
        "passkey:lines",
        "nope",
        "",
        ":",
        "passkey:wording=x",
        "passkey:path=T/pipe",
    ),
]
PLACES = [
    "out",
    "new/deep/out",
    "o[x] :smile:",
    "a\nb",
    LONG,
    "",
    ".",
    "..",
    "out.png",
    "P.txt",
    "link",
    "P/full",
    "P.txt/x",
    "/proc/kvshrink",
    "/dev/null",
    "/dev/full",
    "used",
]
PICTURES = [
    "p.png",
    "p.svg",
    "p",
    "p.PNG",
    "p.jpeg2",
    "d.png",
    "link.png",
    "[b].png",
    LONG + ".png",
    "",
    ".png",
    "P.txt",
    "/dev/null",
    "new/p.png",
]
MEMORY = [
    "64KiB",
    "200KiB",
    "20 GiB",
    "-1",
    "nanGiB",
    "0",
    "1" * 400 + "GiB",
    "1e5",
    "5 apples",
    "\u0664MiB",
    "9" * 400,
]
LISTS = ["cskv,rtn", "rtn", ",", "rtn,rtn", "rtn:bits=4", "nope", "cskv,", "full"]

# options that make each command quick, and those that may be added; what is in capitals stands for a path
QUICK = {
    "fit": {"--text": "T/good.txt", "--length": "128", "--out": "out"},
    "generate": {"--prompt": "One day in spring", "--max-new-tokens": "2", "--method": "rtn"},
    "inspect": {"--out": "p.png"},
    "plan": {
        "--text": "T/good.txt",
        "--length": "256",
        "--tokens": "300",
        "--trials": "1",
        "--methods": "rtn",
        "--kept": "0.4",
    },
    "report": {},
    "eval": {"--task": "passkey", "--tokens": "200", "--cases": "1", "--method": "rtn"},
    "eval perplexity": {"--prefix": "100", "--scored": "4", "--documents": "1", "--method": "rtn"},
    "eval suite": {
        "--methods": "rtn",
        "--kept": "0.5",
        "--tasks": "copy",
        "--lengths": "200",
        "--cases": "1",
        "--documents": "0",
    },
    "eval ablations": {
        "--only": "split",
        "--cases": "1",
        "--documents": "0",
        "--length": "40",
        "--text": "T/nothing.txt",
    },
    "demo": {"--cases": "0"},
    "lm-eval": {},
}
WEIGHTS = {"demo": 1, "lm-eval": 1, "eval ablations": 3, "eval suite": 4, "report": 4}
VALUES = {
    "--model": ["M", *(f"B/{name}" for name in world.BROKEN), "T/good.txt", "nope/none", "./nowhere", "", "~"],
    "--artifact": ["A", "P", "nowhere", "T/good.txt", "", "A/kvshrink.json", "C"],
    "--plan": ["plan.json", "P.txt", "A/kvshrink.json", "T/deep.json", "nowhere"],
    "--text": [
        f"T/{name}"
        for name in ("good.txt", "bracket[0].txt", "latin.txt", "wide.txt", "wide_bare.txt", "binary", "pipe")
    ]
    + [f"T/{name}" for name in ("empty.txt", "blank.txt", "short.txt", "mark.txt", "page.md")]
    + ["T", "/dev/null", "/dev/zero", "nowhere", "", LONG],
    "--method": METHODS,
    "--methods": [*METHODS, *LISTS],
    "--task": TASKS,
    "--tasks": ["copy", "passkey,copy", ",", "", "nope", "ruler/vt", "copy,copy"],
    "--stored": [
        "longbench:path=T/rows.jsonl",
        "longbench",
        "nope",
        "babilong:path=nowhere",
        "scbench:path=T,subset=[1]",
    ],
    "--modes": ["agnostic", "aware", "multi_turn", "agnostic,agnostic", "twice", "", ","],
    "--mode": ["agnostic", "aware", "multi_turn", "decode", "chunked", "prefix_compressed", "simulated", "x"],
    "--lengths": ["200", "0", "-1", "200,200", "99999", "16", "x", "", "1e9", "9" * 5000],
    "--only": ["split", "nope", ",", "", "split,split"],
    "--memory": MEMORY,
    "--prompt": ["One day", *TEXTS, "word " * 600],
    "--out": PLACES,
    "--work": PLACES,
    "--leaderboard": ["T/page.md", *PLACES],
    "--picture": PICTURES,
    "--log-with": ["tensorboard", "x", ""],
}
VALUES |= {"--prompt-file": VALUES["--text"], "--on": VALUES["--text"]}
FLAGS = ("--json",)
COUNTS = (
    "--max-new-tokens",
    "--length",
    "--batch",
    "--tokens",
    "--trials",
    "--seed",
    "--cases",
    "--documents",
    "--scored",
)
COUNTS += ("--prefix", "--chunk", "--trajectory", "--steps", "--keep", "--bits", "--kept", "--kl")
OPTIONS = [*VALUES, *FLAGS, *COUNTS, "--nonsense", "--help"]
WRONG = 5  # one option in so many is none of the command


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
        args = ["--model", "M", "--text", "T/good.txt", "--length", "128"]
        here = Path.cwd()
        os.chdir(root)
        assert called(["fit", *args, "--method", "cskv:keep=0.5,window=16", "--out", "A"])[0] == 0
        plan = [
            "plan",
            *args[:4],
            "--length",
            "256",
            "--tokens",
            "300",
            "--trials",
            "1",
            "--methods",
            "cskv",
            "--kept",
            "0.4",
        ]
        assert called([*plan, "--out", "plan.json"])[0] == 0
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


def line(random: random.Random, w: World) -> list[str]:
    """A command line: a quick good one, changed in up to three places."""
    names = list(QUICK)
    command = random.choices(names, [WEIGHTS.get(n, 10) for n in names])[0]
    options = dict(QUICK[command])
    if command not in ("report", "lm-eval", "demo"):
        options["--model"] = "M"
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        known = [o for o in OPTIONS if o in options or random.random() < 1 / WRONG]
        option = random.choice(known)
        if random.random() < 0.15 and option in options:
            del options[option]
        else:
            options[option] = random.choice(VALUES.get(option, NUMBERS)) if option not in FLAGS else ""
    if random.random() < 0.3 and command != "lm-eval":
        options["--json"] = ""
    words = command.split()
    if command == "report":
        words.append(random.choice(["P", "P/full", "nowhere", "A", "P.txt", "", "T/pipe"]))
    if command == "lm-eval":
        words += random.choice(
            [
                ["--model", "kvshrink"],
                ["run", "--tasks", "nope"],
                ["nope"],
                ["ls", "x"],
                ["run", "--model", "kvshrink", "--model_args", "method=cskv:keep=3", "--tasks", "x"],
            ]
        )
        options = {}
    for option, value in options.items():
        words += [option] if option in (*FLAGS, "--help") else [option, w.resolved(value)]
    if random.random() < 0.05:
        words.insert(random.randrange(len(words) + 1), random.choice(TEXTS))
    return words


def called(words: list[str]) -> tuple[int | str, str, str]:
    """(exit code, or what came out instead; stdout; stderr) of the program in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    argv, sys.argv = sys.argv, ["kvshrink", *words]
    code: int | str = "no exit"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else str(stop.code)
    except TimeoutError:
        raise
    except BaseException as error:
        code = repr(error)
    finally:
        sys.argv = argv
    return code, *(x.buffer.getvalue().decode("utf-8", "replace") for x in (out, err))


def judged(words: list[str], code: int | str, out: str, err: str) -> str | None:
    """What breaks the rule, or None."""
    lines = [x for x in err.split("\n") if x.strip() and "\r" not in x]
    if "Traceback" in err:
        return "traceback"
    if code == 0:
        if "--json" in words and "--help" not in words and not _is_object(out):
            return "the last line is no JSON object"
        return None
    if code != 2:
        return f"exit {code}"
    if lines and "this is a bug" in lines[-1]:
        return lines[-1]
    if not lines or not lines[-1].startswith("kvshrink: "):
        return "no line"
    return None if len(lines) == 1 or words[0] == "lm-eval" else f"{len(lines)} lines"


def _is_object(out: str) -> bool:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        return isinstance(json.loads(out.splitlines()[-1], parse_constant=refuse), dict)
    except (ValueError, IndexError):
        return False


def run(cases: int, seed: int, root: Path, first: int = 0) -> Tally:
    """Try so many command lines in a folder."""
    tally, w, here = Tally("commands", seed), World(root), Path.cwd()
    signal.signal(signal.SIGALRM, _late)
    for case in range(first, first + cases):
        words = line(source("commands", seed, case), w)
        place = Path(tempfile.mkdtemp(prefix="run-", dir=root.parent))
        (place / "link").symlink_to(w.paths["P"])
        (place / "link.png").symlink_to(root / "P.txt")
        (place / "d.png").mkdir()
        (place / "used").mkdir()
        (place / "used" / ".kvshrink-run.json").write_text('{"command": "other"}\n')
        os.chdir(place)
        started = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            code, out, err = called(words)
            what = judged(words, code, out, err)
        except TimeoutError:
            code, err, what = "late", "", f"no end in {SECONDS} s"
        finally:
            signal.alarm(0)
            os.chdir(here)
        after = world.snapshot(root)
        if what is None and any(after.get(k) != v for k, v in w.before.items()):
            what = "changed " + ", ".join(k for k, v in w.before.items() if after.get(k) != v)
        shutil.rmtree(place)
        if what is None:
            tally.add(f"exit {code}")
        else:
            w.before = after
            tally.find(
                case,
                what,
                words=[x[:400] for x in words],
                stderr=err[-600:],
                seconds=round(time.perf_counter() - started, 1),
            )
    return tally


def _late(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
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
