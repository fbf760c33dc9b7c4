"""One layer's decode step in two versions of kvshrink, in turn: the checkout that this file is in, and an earlier one.

    git worktree add ../before COMMIT
    python bench/versions.py ../before                        # writes bench/results/versions.json
    python bench/versions.py ../before --generate --tokens 1024 --out bench/results/versions_generate.json

Each version runs in a process of its own, with its own bench/decode.py's methods and its own contender; only one works
at a time. A turn is 32 steps, in one of which a page leaves the window, or --steps. Ratios are of this version's time
over the earlier one's: of the medians of all steps, and of whole turns (which have what happens once a page), the
median turn. With --generate a step is a new token of bench/generate.py's model of four layers.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from timing import setting

WORKER = """
import json, sys, time
root = sys.argv[1]
sys.path[:0] = [root + "/bench", root + "/src"]
import torch
torch.set_num_threads(int(sys.argv[2]))
try:
    import contenders as made
except ImportError:
    import sides as made
import decode
from layer import Layer
state = {}
methods = {**getattr(decode, "QUANTISERS", {}), **decode.METHODS}
print(json.dumps(sorted(methods)), flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        job = json.loads(line)
        if "name" in job and job["generate"]:
            import generate as g
            plain, model = (g.random_model(torch.bfloat16, torch.device("cpu")) for _ in range(2))
            attachment = g.attach(model)
            cache = g.make_cache(model, g.artifact(model, methods[job["name"]]))
            g.fill(cache, g.dense(plain, job["tokens"]), attachment)
            ids = torch.randint(1, 512, (1, job["tokens"] + 1), generator=torch.Generator().manual_seed(0))
            given = ids if hasattr(g, "Setup") else job["tokens"]
            side = (getattr(g, "Contender", None) or g.Side)(model, cache, given)
            state["step"] = lambda: side.seconds(1)
            print("{}", flush=True)
        elif "name" in job:
            layer = Layer("llama-3.1-8b", job["tokens"], 1, torch.bfloat16, torch.device("cpu"))
            state["step"] = made.shrunken(layer, job["name"], methods[job["name"]]).step
            state["step"]()
            print("{}", flush=True)
        else:
            times = []
            for _ in range(job["steps"]):
                start = time.perf_counter()
                own = state["step"]()  # in generate, without what generate does before the first token
                times.append(own if isinstance(own, float) else time.perf_counter() - start)
            print(json.dumps(times), flush=True)
"""


class Version:
    """A worker process."""

    def __init__(self, root: Path, threads: int) -> None:
        command = [sys.executable, "-c", WORKER, str(root), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names = self._answer()

    def ask(self, **job: object) -> list:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> list:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a version ended before its time: see what it printed")
        return json.loads(line)


def compare(now: Version, before: Version, name: str, tokens: int, turns: int, steps: int, generate: bool) -> dict:
    for version in (now, before):
        version.ask(name=name, tokens=tokens, generate=generate)
        version.ask(steps=steps)
    times: dict[str, list[list[float]]] = {"now": [], "before": []}
    for turn in range(turns):
        order = [("now", now), ("before", before)]
        for key, version in order if turn % 2 else order[::-1]:
            times[key].append(version.ask(steps=steps))
    step = {key: statistics.median(x for turn in found for x in turn) for key, found in times.items()}
    turn_of = {key: statistics.median(sum(turn) for turn in found) for key, found in times.items()}
    row = {"tokens": tokens, "method": name, "step": step["now"] / step["before"]}
    return row | {"turn": turn_of["now"] / turn_of["before"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--generate", action="store_true", help="steps of generate, not of one layer")
    parser.add_argument("--threads", type=int, default=1, help="with more, the version that waits disturbs the other")
    parser.add_argument("--methods", nargs="*", help="default: all of bench/decode.py, its quantisers too")
    parser.add_argument("--out", type=Path, default=Path("bench/results/versions.json"))
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    now, before = Version(root, args.threads), Version(args.before.resolve(), args.threads)
    commit = subprocess.run(["git", "-C", args.before, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    rows = []
    for tokens in args.tokens:
        for name in args.methods or [n for n in now.names if n in before.names]:
            rows.append(
                {
                    k: round(x, 4) if isinstance(x, float) else x
                    for k, x in compare(now, before, name, tokens, args.turns, args.steps, args.generate).items()
                }
            )
            print(rows[-1], flush=True)
    import torch

    record = {
        "what": "time of a decode step over that of the earlier version",
        "command": "python bench/versions.py BEFORE " + " ".join(sys.argv[2:]),
        "threads": args.threads,
        "before": commit.stdout.strip(),
        "setting": setting(torch.device("cpu")),
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
