"""What importing kvshrink costs beside what every model needs: torch and transformers' PreTrainedModel.

python bench/imports.py                                   # writes bench/results/imports.json
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 5
STATEMENTS = {
    "kvshrink": "import kvshrink",
    "models": "import torch; from transformers import PreTrainedModel",
    "bare": "import torch, transformers",
}


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def own_share() -> float:
    """Of the time of all imports, that of our own modules without what they import."""
    command = [sys.executable, "-X", "importtime", "-c", STATEMENTS["kvshrink"]]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    times = [(int(us), name) for us, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", out)]
    return sum(us for us, name in times if name.split(".")[0] == "kvshrink") / sum(us for us, _ in times)


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(ROUNDS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    found = {name: statistics.median(x) for name, x in times.items()}
    record = {"command": "python bench/imports.py", "rounds": ROUNDS}
    record |= {f"over_{name}": round(found["kvshrink"] / found[name], 2) for name in ("models", "bare")}
    record["own_share"] = round(statistics.median(own_share() for _ in range(ROUNDS)), 3)
    print(record)
    Path("bench/results/imports.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
