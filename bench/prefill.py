"""What shrinking costs a prefill: time beside DynamicCache, and peak memory above the bytes held.

    python bench/prefill.py                       # writes bench/results/prefill.json

A model of 4 layers with Llama-3.1-8B's attention shape and random weights, small in everything else: a real model has
more to compute for each token, so that encoding's share is smaller there.
added:      share of the prefill's time spent in the cache's `update`, less DynamicCache's, timed inside the prefill.
ratio:      whole prefills, in turn.
above_held: most bytes alive beyond those of the same forward without a cache, less the bytes held at its end, in layers
            of full KV.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from decode import METHODS
from models import artifact, random_model
from timing import against, setting
from transformers import DynamicCache

from kvshrink import make_cache
from kvshrink.attach import attach
from kvshrink.eval.run.memory import peak
from kvshrink.store import files

BASE = "DynamicCache"
SHOWN = (
    "CSKV 0.2 int4 auto",
    "CSKV 0.2 int4 joint",
    "CSKV 0.2 auto",
    "RoPE-commuting 0.2 int4",
    "spectral 0.0625",
    "KIVI int4",
    "RTN int4",
)


def prefill(model, ids: torch.Tensor, make) -> tuple[float, float]:
    """(seconds of the prefill, of them in the cache's `update`)."""
    cache, inside = make(), 0.0
    update = cache.update

    def timed(*args, **kwargs):
        nonlocal inside
        start = time.perf_counter()
        found = update(*args, **kwargs)
        inside += time.perf_counter() - start
        return found

    cache.update = timed
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start, inside


def memory(model, ids: torch.Tensor, make, without: int) -> float:
    """Peak of a prefill above one without a cache, less what is held, in layers of full KV."""
    held = []

    def step() -> None:
        cache = make()
        model(ids, past_key_values=cache, logits_to_keep=1)
        held.append(cache.nbytes)

    config = model.config
    full = 2 * ids.shape[1] * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return (peak(step, ids.device) - without - held[0]) / full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/prefill.json"))
    args = parser.parse_args()
    if args.tokens < 256 or args.rounds < 1:
        parser.error("use --tokens of at least 256 and --rounds of at least 1")
    plain, model = (random_model(getattr(torch, args.dtype), torch.device("cpu")) for _ in range(2))
    attach(model)
    ids = torch.randint(1, 512, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    makes = {name: partial(make_cache, model, artifact(model, METHODS[name])) for name in SHOWN}
    contenders = {BASE: (plain, DynamicCache)} | {name: (model, make) for name, make in makes.items()}
    rows = []
    with torch.inference_mode():
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        shares: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(args.rounds + 1):
            for name, (its, make) in contenders.items():
                whole, inside = prefill(its, ids, make)
                if round_:
                    seconds[name].append(whole)
                    shares[name].append(inside / whole)
        without = peak(lambda: model(ids, use_cache=False, logits_to_keep=1), ids.device)
        for name in contenders:
            added = statistics.median(shares[name]) - statistics.median(shares[BASE])
            row = {"contender": name, "added": round(added, 4), **against(seconds, name, BASE)}
            if name in makes:
                row["above_held"] = round(memory(model, ids, makes[name], without), 3)
            rows.append(row)
            layers = f"{row['above_held']:6.2f} layers of KV above what is held" if name in makes else ""
            print(f"{name:28s} {100 * added:6.2f} % added, prefills {row['ratio']:.3f}x {layers}")
    where = {"tokens": args.tokens, "dtype": args.dtype, "rounds": args.rounds, "setting": setting(ids.device)}
    files.write_json(args.out, {"command": " ".join(["python", *sys.argv]), **where, "rows": rows})


if __name__ == "__main__":
    main()
