"""Closed form beside the paper's own fitting: reconstruction error on calibration and held-out text, and time.

    python bench/fit.py --out bench/results/fit.json

Error: |x - x'|^2 / |x - E x|^2 of a layer's keys (before RoPE) and values. On the calibration text the closed form is a
lower bound; on held-out text the mean over rows comes with a bootstrap interval. Times are of one run, as ratios.
"""

import argparse
import time
from pathlib import Path

import torch

from kvshrink import CSKV, data, fit, reference_model
from kvshrink.attach.asking import key_value
from kvshrink.attach.families import decoder_layers
from kvshrink.eval.run import calibration
from kvshrink.eval.run.stats import bootstrap
from kvshrink.fit.data import token_rows
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.source import InMemory
from kvshrink.fit.statistics import MomentStream, residual
from kvshrink.methods._stats import Moments
from kvshrink.store import files

KEEPS = (0.5, 0.2)


def variants(keep: float, steps: int) -> dict[str, CSKV]:
    return {
        "pca": CSKV(keep=keep),
        "asvd": CSKV(keep=keep, init="asvd"),
        f"asvd + {steps} steps, lr 5e-5 (paper)": CSKV(keep=keep, init="asvd", steps=steps),
        f"asvd + {steps} steps, lr 1e-3": CSKV(keep=keep, init="asvd", steps=steps, lr=1e-3),
    }


def held_out(model, rows: torch.Tensor) -> dict[int, list[tuple[Moments, Moments]]]:
    """Per layer, the key and value moments of each row."""
    runner, found = LayerRunner(InMemory(model), rows, 1), {}
    for i in range(runner.layers):
        pairs: list[tuple[Moments, Moments]] = []

        def watch(module, kwargs, pairs=pairs) -> None:
            moments = []
            for x in key_value(module, kwargs):
                stream = MomentStream()
                stream.add(x.transpose(1, 2).flatten(2))
                moments.append(stream.moments())
            pairs.append(tuple(moments))

        layer = decoder_layers(model)[i]
        runner.run(i, layer, watch, layer.self_attn)
        found[i] = pairs
    return found


def errors(tensors: dict, rows: list[tuple[Moments, Moments]], seed: int) -> dict:
    """Mean held-out error of keys and values with its 95 % interval over rows."""
    out = {}
    for n, kv in enumerate(("key", "value")):
        up = tensors[f"{kv}_up"]
        down = tensors.get(f"{kv}_down", up.transpose(1, 2))
        values = [residual(pair[n], down, up, tensors[f"{kv}_mean"]) for pair in rows]
        low, high = bootstrap(values, seed)
        out[kv] = {"mean": round(sum(values) / len(values), 5), "low": round(low, 5), "high": round(high, 5)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/fit.json"))
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    model, tokenizer = reference_model("float32")
    text = calibration.default_text()
    test = token_rows(data.path("heldout.txt").read_text(encoding="utf-8")[:120_000], tokenizer, 1024, 32)
    unseen = held_out(model, test)
    rows, seconds = [], {}
    for keep in KEEPS:
        for name, method in variants(keep, args.steps).items():
            torch.manual_seed(0)
            start = time.perf_counter()
            artifact = fit(model, method, text, tokenizer=tokenizer, batch=4)
            seconds[name, keep] = time.perf_counter() - start
            for i, tensors in artifact.layers.items():
                record = artifact.provenance["layers"][str(i)]
                known = {kv: round(record[f"{kv}_error"], 5) for kv in ("key", "value")}
                row = {"keep": keep, "fit": name, "layer": i, "calibration": known}
                rows.append({**row, "held_out": errors(tensors, unseen[i], seed=i)})
            print(keep, name, [(r["calibration"], r["held_out"]) for r in rows[-len(artifact.layers) :]], flush=True)
    ratios = {f"{n}, keep {k}": round(s / seconds["pca", k], 2) for (n, k), s in seconds.items()}
    where = {"model": "reference, float32", "steps": args.steps, "held_out_rows": len(test)}
    files.write_json(args.out, {"command": "python bench/fit.py", **where, "time_over_pca": ratios, "rows": rows})
    print(ratios)


if __name__ == "__main__":
    main()
