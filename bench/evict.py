"""A decode step where tokens or heads are dropped: time and bytes over the full cache's, in turn.

    python bench/evict.py                                     # writes bench/results/evict.json

One layer of Llama-3.1-8B's shape in bfloat16, 32k tokens. A step is the cache's `update`, the scoring that the method
asks for, and attention. The full cache is ours (`Full()`), which is several times as fast as DynamicCache with sdpa;
that one is a row too. The 32k tokens are given without their queries, since which tokens are kept does not change a
step's time, but what heads of two classes keep, which is set by hand: as many whole heads as `ratio` says.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import contenders
import torch
from fork import alive, cache_of
from layer import Layer
from timing import in_turn, setting

from kvshrink.cache import attend
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.eval.run.entries import parse
from kvshrink.methods import build
from kvshrink.methods._roles import Method
from kvshrink.methods.quant.exact import Full
from kvshrink.store.tokens import TokenTable

RATIOS = (0.5, 0.25, 0.125)
NAMES = (
    *("snapkv", "adakv", "h2o", "a2sf", "scissorhands", "tova", "expected_attention", "knorm", "keydiff", "lagkv"),
    *("kvcrush", "duo_attention"),
)
JOINED = ("snapkv + turboquant:bits=4", "snapkv + turboquant:bits=2")


def update(cache: KVCache, layer: Layer, keys: torch.Tensor, values: torch.Tensor, ask: bool) -> torch.Tensor:
    """The step's attention output; nothing before any token has left."""
    seen, s = cache.get_seq_length(), keys.shape[2]
    rows = cache.compressed[0].probes(s) if ask else None
    probe = None
    if rows is not None:
        queries = torch.randn(1, layer.q_heads, len(rows), layer.d, generator=torch.Generator().manual_seed(seen))
        probe = ProbeQueries(rows, queries * layer.d**-0.5, None)
    cache.stage(0, torch.arange(seen, seen + s)[None].int(), None, layer.rope, True, "model", probe)
    out = cache.update(keys, values, 0)
    if not hasattr(out[0], "_kvshrink"):
        return out[0]
    return attend.attend(layer.query, *out, None, layer.d**-0.5, None, out[0]._kvshrink)


def empty(method: Method, layer: Layer, ratio: float) -> KVCache:
    if method.needs_fit:  # which heads keep everything
        whole = torch.arange(layer.heads) < round(ratio * layer.heads)
        policy = method.policy(layer.shape, {"whole": whole.byte()})
        table = TokenTable()
        own = CompressedLayer(method, layer.shape, method.tiers(layer.shape, {}), table, policy=policy)
        return KVCache([own], method, table, "model", "fitted")
    return cache_of(method, layer.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=33, help="a page leaves the window in one of 32")
    parser.add_argument("--out", type=Path, default=Path("bench/results/evict.json"))
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        layer = Layer("llama-3.1-8b", args.tokens, 1, torch.bfloat16, torch.device("cpu"))
        for name in (*NAMES, *JOINED):
            steps: dict[str, Callable[[], object]] = {"DynamicCache + sdpa": contenders.growing(layer).step}
            held = {}
            jobs: list[tuple[str, Method, float]] = [("full", Full(), 1.0)]
            for ratio in RATIOS:
                first, plus, rest = name.partition(" + ")
                settings = {"ratio": ratio} | ({"sinks": 4} if first == "duo_attention" else {})
                text = f"{first}:ratio={ratio} + {rest}"
                jobs.append((str(ratio), parse(text).method if plus else build(name, settings), ratio))
            for label, method, ratio in jobs:
                cache = empty(method, layer, ratio)
                update(cache, layer, layer.keys, layer.values, False)
                held[label] = alive(cache)
                steps[label] = partial(update, cache, layer, layer.key, layer.value, True)
            times = {k: statistics.median(v) for k, v in in_turn(steps, args.rounds, layer.device).items()}
            for label, own in times.items():
                row = {"method": name, "side": label, "time": round(own / times["full"], 4)}
                rows.append(row | ({"bytes": round(held[label] / held["full"], 4)} if label in held else {}))
                print(rows[-1], flush=True)
    record = {
        "what": "time and bytes of a decode step over those of the full cache in our pages",
        "tokens": args.tokens,
    }
    record |= {"command": "python bench/evict.py", "setting": setting(torch.device("cpu")), "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
