"""A decode step where KV heads keep a share of their tokens: time and bytes over keeping all of them, in turn.

    python bench/evict.py                                     # writes bench/results/evict.json

One layer of Llama-3.1-8B's shape in bfloat16, 32k tokens. The step is the cache's `update`, the scoring that the method
asks for, and attention. A prompt of 32k tokens is ranked by SnapKV's and AdaKV's last queries; H2O's, whose queries are
all of it, takes minutes on a CPU and is left out of the fill: which tokens are kept does not change a step's time.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fork import alive, cache_of
from layer import Layer
from timing import in_turn, setting

from kvshrink.cache import attend
from kvshrink.cache.cache import KVCache
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.methods import build

RATIOS = (1.0, 0.5, 0.25, 0.1)


def update(cache: KVCache, layer: Layer, keys: torch.Tensor, values: torch.Tensor, ask: bool) -> torch.Tensor:
    """The step's attention output; nothing before any token has left."""
    seen, s = cache.get_seq_length(), keys.shape[2]
    rows = cache.compressed[0].probes(s) if ask else None
    probe = None
    if rows is not None:
        queries = torch.randn(1, layer.q_heads, len(rows), layer.d, generator=torch.Generator().manual_seed(seen))
        probe = ProbeQueries(rows, queries * layer.d**-0.5, None)
    cache.stage(0, torch.arange(seen, seen + s)[None].int(), None, None, True, "model", probe)
    out = cache.update(keys, values, 0)
    if not hasattr(out[0], "_kvshrink"):
        return out[0]
    return attend.attend(layer.query, *out, None, layer.d**-0.5, None, out[0]._kvshrink)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=33, help="a page leaves the window in one of 32")
    parser.add_argument("--out", type=Path, default=Path("bench/results/evict.json"))
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        layer = Layer("llama-3.1-8b", args.tokens, 1, torch.bfloat16, torch.device("cpu"))
        for name in ("snapkv", "adakv", "h2o"):
            steps: dict[str, Callable[[], object]] = {}
            held = {}
            for ratio in RATIOS:
                cache = cache_of(build(name, {"ratio": ratio}), layer.shape)
                update(cache, layer, layer.keys, layer.values, name != "h2o")
                held[str(ratio)] = alive(cache)
                steps[str(ratio)] = partial(update, cache, layer, layer.key, layer.value, True)
            times = {k: statistics.median(v) for k, v in in_turn(steps, args.rounds, layer.device).items()}
            for ratio in steps:
                rows.append({"method": name, "ratio": float(ratio), "time": round(times[ratio] / times["1.0"], 4)})
                rows[-1]["bytes"] = round(held[ratio] / held["1.0"], 4)
                print(rows[-1], flush=True)
    record = {"what": "time and bytes of a decode step over those of ratio 1", "tokens": args.tokens}
    record |= {"command": "python bench/evict.py", "setting": setting(torch.device("cpu")), "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
