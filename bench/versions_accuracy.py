"""Accuracy at equal memory in two versions of kvshrink: KL on held-out text of the bundled model, and bytes held.

    git worktree add ../before COMMIT
    python bench/versions_accuracy.py ../before               # writes bench/results/versions_accuracy.json

Each version fits its own artifacts in a process of its own, from the same calibration text, and reads the same 4
documents of 4,096 tokens, the last 128 in forwards of 32, as bench/equal_bytes.py does.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

WORKER = """
import json, sys
root = sys.argv[1]
sys.path[:0] = [root + "/src"]
import numpy as np
import torch
torch.set_num_threads(1)
from kvshrink import CSKV, Spectral, methods, reference_model
try:
    from kvshrink.attach.budget import at_byte_ratio
    from kvshrink.eval.run import calibration
    from kvshrink.eval.run.entries import Entry
    from kvshrink.eval.run.fitting import fitted
    from kvshrink.eval.run.measure import held_out
    from kvshrink.eval.run.teacher import follow
except ImportError:
    from kvshrink.eval import calibration
    from kvshrink.eval.budget import at_kept as at_byte_ratio
    from kvshrink.eval.entries import Entry
    from kvshrink.eval.fitting import fitted
    from kvshrink.eval.measure import held_out
    from kvshrink.eval.teacher import follow
sys.path.append(sys.argv[2])  # half_linear, which the earlier version may not have
from half_linear import in_float32_where_faster
sys.path.pop()
model, tokenizer = reference_model()
in_float32_where_faster(model)
found = {
    "spectral at 6.25 %": at_byte_ratio(Spectral(), 0.0625, model, 4096).method,
    "cskv int4 at 12.5 %": at_byte_ratio(CSKV(bits=4), 0.125, model, 4096).method,
    "cskv int4, keep .2": CSKV(keep=0.2, bits=4),
    "turboquant 4": methods.build("turboquant", {"bits": 4}),
    "turboquant 2": methods.build("turboquant", {"bits": 2}),
    "kivi 2": methods.build("kivi", {}),
    "kvquant 2": methods.build("kvquant", {"bits": 2}),
}
texts = calibration.default_text()
entries = fitted([Entry(label, method) for label, method in found.items()], model, tokenizer, texts)
rows = {e.label: [] for e in entries}
for ids in held_out(tokenizer, 4096, 4, 0):
    for label, track in follow(model, {e.label: e.method for e in entries}, ids, ids.shape[-1] - 128, 32).items():
        rows[label].append((float(np.mean(track.kl)), float(getattr(track, "byte_ratio", None) or track.kept)))
print(json.dumps({label: np.mean(found, 0).tolist() for label, found in rows.items()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--out", type=Path, default=Path("bench/results/versions_accuracy.json"))
    args = parser.parse_args()
    roots = {"now": Path(__file__).resolve().parents[1], "before": args.before.resolve()}
    package = str(roots["now"] / "src" / "kvshrink")
    running = {
        key: subprocess.Popen([sys.executable, "-c", WORKER, str(root), package], stdout=subprocess.PIPE, text=True)
        for key, root in roots.items()
    }
    found = {key: json.loads(process.communicate()[0].splitlines()[-1]) for key, process in running.items()}
    rows = [
        {
            "method": name,
            **{f"{what}_{key}": found[key][name][i] for i, what in enumerate(("kl", "bytes")) for key in roots},
        }
        for name in found["now"]
    ]
    for row in rows:
        print(row)
    record = {"command": "python bench/versions_accuracy.py BEFORE", "documents": 4, "tokens": 4096, "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
