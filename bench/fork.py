"""What forks, beams, joins and splits of a cache cost: milliseconds' ratio apart, bytes, and records copied (none).

    python bench/fork.py                                      # writes bench/results/fork.json

One layer of Llama-3.1-8B's shape in bfloat16 for forks and beams; in float32, and smaller, for joins, whose outputs are
compared with each cache's own.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from timing import setting

from kvshrink.cache import attend
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store.bytes import nbytes
from kvshrink.store.pool import Run
from kvshrink.store.tokens import TokenTable

METHODS = {"unquantised": RTN(bits=None), "int4": RTN(bits=4)}
BEAMS, PROMPT = 8, 4096
LENGTHS = [100 + i * 7900 // 15 for i in range(16)]


def cache_of(method: Method, shape: LayerShape) -> KVCache:
    table = TokenTable()
    return KVCache([CompressedLayer(method, shape, method.tiers(shape, {}), table)], method, table, "model", "fitted")


def feed(cache: KVCache, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens, at the positions that each row goes on with."""
    b, _, s, _ = keys.shape
    lengths = torch.from_numpy(cache.table.lengths) if cache.table.rows else torch.zeros(b, dtype=torch.int64)
    cache.stage(0, (lengths[:, None] + torch.arange(s)).int(), None, None, True, "model")
    return cache.update(keys, values, 0)


def alive(*caches: KVCache) -> int:
    """Bytes of all of them together, what they share once."""
    layers = [layer for cache in caches for layer in cache.compressed]
    tensors = [t for layer in layers for t in layer.tensors()] + [t for c in caches for t in c.table.tensors()]
    kept = {id(age.kept): age.kept for layer in layers for age in layer.body.ages}
    return nbytes(tensors) + sum(k.index_bytes for k in kept.values())


def fork(method: Method, tokens: int, shape: LayerShape) -> dict:
    cache = cache_of(method, shape)
    feed(cache, *torch.randn(2, 1, shape.heads, tokens, shape.head_dim).to(shape.dtype))
    times = []
    for _ in range(50):
        start = time.perf_counter()
        other = copy.deepcopy(cache)
        times.append(time.perf_counter() - start)
    one, both = alive(cache), alive(cache, other)
    feed(other, *torch.randn(2, 1, shape.heads, 1, shape.head_dim).to(shape.dtype))
    return {
        "tokens": tokens,
        "milliseconds": 1e3 * statistics.median(times),
        "more_bytes": both / one - 1,
        "more_bytes_after_a_step": alive(cache, other) / one - 1,
    }


def beams(method: Method, shape: LayerShape) -> dict:
    """Bytes over those of one sequence, while beams that are drawn anew in every step grow."""
    cache = cache_of(method, shape)
    feed(cache, *torch.randn(2, 1, shape.heads, PROMPT, shape.head_dim).to(shape.dtype))
    one = alive(cache)
    cache.batch_repeat_interleave(BEAMS)
    found = [alive(cache) / one]
    for _ in range(64):
        feed(cache, *torch.randn(2, BEAMS, shape.heads, 1, shape.head_dim).to(shape.dtype))
        cache.reorder_cache(torch.randint(0, BEAMS, (BEAMS,)))
        found.append(alive(cache) / one)
    return {"beams": BEAMS, "prompt": PROMPT, "at_once": found[0], "after_16": found[16], "most_in_64": max(found)}


def joins(method: Method) -> dict:
    """16 caches of 100 to 8,000 tokens as one batch, then each alone again."""
    shape, copied = LayerShape(2, 32, torch.float32), []
    caches = [cache_of(method, shape) for _ in LENGTHS]
    for cache, tokens in zip(caches, LENGTHS, strict=True):
        feed(cache, *torch.randn(2, 1, 2, tokens, 32))
    take, Run.take = Run.take, lambda *a: copied.append(a[0]) or take(*a)
    batch = KVCache.join(caches)
    again = batch.split()
    Run.take = take
    worst = 0.0
    for _ in range(40):
        keys, values = torch.randn(2, len(caches), 2, 1, 32)
        query = torch.randn(len(caches), 4, 1, 32)
        mask = torch.cat([batch.attention_mask, torch.ones(len(caches), 1, dtype=torch.int64)], 1).bool()[:, None, None]
        together = attend.attend(query, *(out := feed(batch, keys, values)), mask, 32**-0.5, None, out[0]._kvshrink)
        for i, (cache, row) in enumerate(zip(caches, again, strict=True)):
            for one in (cache, row):
                k, v = feed(one, keys[i : i + 1], values[i : i + 1])
                alone = attend.attend(query[i : i + 1], k, v, None, 32**-0.5, None, k._kvshrink)
                worst = max(worst, float((alone - together[i : i + 1]).abs().max()))
    return {"lengths": LENGTHS, "steps": 40, "records_copied": sum(copied), "largest_difference": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/fork.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    shape, rows = LayerShape(8, 128, torch.bfloat16), {}
    with torch.inference_mode():
        for name, method in METHODS.items():
            rows[name] = {"fork": fork(method, 32768, shape), "beams": beams(method, shape), "joins": joins(method)}
            print(name, json.dumps(rows[name]))
    record = {"command": "python bench/fork.py", "setting": setting(torch.device("cpu")), "methods": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
