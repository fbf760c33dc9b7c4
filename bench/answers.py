"""Answers that `equal_bytes.py` has written to its --work folder, summed up: of a run that was stopped, too.

    python bench/answers.py --work equal_bytes --out docs/results/smollm2/answers.json

A row counts the tasks of which it has all cases that the full cache has.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from kvshrink.eval.run.entries import FULL
from kvshrink.eval.run.stats import bootstrap
from kvshrink.store import files


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method: answers, their mean score with its interval, by task, how often they are the full cache's."""
    by_method: dict[str, dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_method[row["method"]][row["task"], row["index"]] = row
    full = by_method[FULL]
    tasks: dict[str, list] = defaultdict(list)
    for key in full:
        tasks[key[0]].append(key)
    found = []
    for label, own in by_method.items():
        whole = {task: keys for task, keys in tasks.items() if all(key in own for key in keys)}
        keys = [key for task in whole.values() for key in task]
        if not keys:
            continue
        scores = [own[key]["score"] for key in keys]
        low, high = bootstrap(scores, 0)
        row = {"label": label, "answers": len(keys), "score": round(float(np.mean(scores)), 4)}
        row |= {"low": round(low, 4), "high": round(high, 4)}
        row["full_on_these"] = round(float(np.mean([full[key]["score"] for key in keys])), 4)
        row["by_task"] = {
            task: round(float(np.mean([own[k]["score"] for k in of])), 3) for task, of in sorted(whole.items())
        }
        row["as_full"] = round(float(np.mean([own[k]["output"] == full[k]["output"] for k in keys])), 4)
        if not label.startswith(("QuantizedCache", FULL)):  # what a runner counts is ours
            row["byte_ratio"] = round(float(np.mean([own[k]["nbytes"] / own[k]["full"] for k in keys])), 5)
        found.append(row)
    return sorted(found, key=lambda r: r["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("equal_bytes"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--command", default="", help="the command that wrote them, to be kept beside")
    parser.add_argument("--out", type=Path, default=Path("docs/results/smollm2/answers.json"))
    args = parser.parse_args()
    lines = (args.work / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("length") == args.length]
    found = summed(rows)
    files.write_json(
        args.out, {"command": args.command, "model": "smollm2, bfloat16", "length": args.length, "rows": found}
    )
    for row in found:
        print(row["label"], row["answers"], row["score"], row["full_on_these"])


if __name__ == "__main__":
    main()
