"""Decode attention of one layer: shrunken caches beside DynamicCache + sdpa, measured in turn in one process.

    python bench/decode.py                                   # or: make bench
    bench/peers/make.sh quanto && bench/peers/quanto/venv/bin/python bench/decode.py --quanto

A step is what a layer does for one new token: the cache's `update` and the attention over everything cached. The result
is checked first, against attention over the same cache rebuilt at full width; a wrong result prints no time.
On a CPU only the ratios are results. The last line is one JSON object, also written to --out.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvshrink.attach.attention import kvshrink_attention
from kvshrink.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.methods._facts import LayerShape
from kvshrink.methods._roles import Method
from kvshrink.methods.lowrank._basis import orthonormal
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store.bytes import nbytes
from kvshrink.store.tokens import TokenTable

MODELS = {"llama-3.1-8b": (32, 8, 128, 5e5), "llama-2-7b": (32, 32, 128, 1e4)}  # q heads, KV heads, head dim, theta


@dataclass
class Side:
    """One way to hold the cache: `step` does one token's update and attention and gives its output."""

    name: str
    step: Callable[[], Tensor]
    held: Callable[[], int]
    check: Callable[[], float] | None = None


class Case:
    """Random keys, values and queries of one layer."""

    def __init__(self, model: str, tokens: int, dtype: torch.dtype) -> None:
        self.q_heads, self.heads, self.d, theta = MODELS[model]
        self.tokens, self.dtype = tokens, dtype
        self.module = torch.nn.Module()
        self.module.num_key_value_groups = self.q_heads // self.heads
        self.rope = Rope(theta ** (-torch.arange(0, self.d, 2).float() / self.d), 1.0, False)
        g = torch.Generator().manual_seed(0)
        shape = (1, self.heads, tokens, self.d)
        self.keys = torch.randn(shape, generator=g).to(dtype)
        self.values = torch.randn(shape, generator=g).to(dtype)
        self.key = torch.randn(1, self.heads, 1, self.d, generator=g).to(dtype)
        self.value = torch.randn(1, self.heads, 1, self.d, generator=g).to(dtype)
        self.query = torch.randn(1, self.q_heads, 1, self.d, generator=g).to(dtype)

    def sdpa(self, keys: Tensor, values: Tensor) -> Tensor:
        return sdpa_attention_forward(self.module, self.query, keys, values, None)[0]

    def shrunken(self, name: str, method: Method) -> Side:
        shape = LayerShape(self.heads, self.d, self.dtype)
        table = TokenTable()
        layer = CompressedLayer(method, shape, method.codecs(shape, fitted(method, shape)), table)
        cache = KVCache([layer], method, table, "bench", "bench")

        def update(keys: Tensor, values: Tensor, own: bool = True) -> tuple[Tensor, Tensor]:
            start = layer.seen
            positions = torch.arange(start, start + keys.shape[2], dtype=torch.int32)[None]
            cache.stage(0, positions, None, self.rope, own, "bench")
            return cache.update(keys, values, 0)

        def step() -> Tensor:
            keys, values = update(self.key, self.value)
            return kvshrink_attention(self.module, self.query, keys, values, None)[0]

        def check() -> float:
            """Relative error of our attention against float32 attention over the cache rebuilt at full width."""
            ours = step().float()
            cache.crop(-1)
            keys, values = update(self.key, self.value, own=False)
            g = self.q_heads // self.heads
            k, v = (x.float().repeat_interleave(g, 1) for x in (keys, values))
            weights = torch.softmax(self.query.float() @ k.transpose(-1, -2) * self.d**-0.5, -1)
            wanted = (weights @ v).transpose(1, 2)
            return float((ours - wanted).norm() / wanted.norm())

        update(self.keys, self.values)
        return Side(name, step, lambda: cache.nbytes, check)

    def dense(self) -> list[Side]:
        cache = DynamicCache()
        cache.update(self.keys, self.values, 0)

        def step() -> Tensor:
            keys, values = cache.update(self.key, self.value, 0)
            return self.sdpa(keys, values)

        def attention_only() -> Tensor:
            return self.sdpa(cache.layers[0].keys, cache.layers[0].values)

        def held() -> int:
            return nbytes([cache.layers[0].keys, cache.layers[0].values])

        return [Side("DynamicCache + sdpa", step, held), Side("sdpa alone, no update", attention_only, held)]

    def quanto(self) -> Side:
        from transformers.cache_utils import QuantoQuantizedLayer

        layer = QuantoQuantizedLayer(nbits=4)
        layer.update(self.keys, self.values)

        def step() -> Tensor:
            keys, values = layer.update(self.key, self.value)
            return self.sdpa(keys, values)

        def held() -> int:
            packed = [q._data._data for q in (layer._quantized_keys, layer._quantized_values)]
            side = [t for q in (layer._quantized_keys, layer._quantized_values) for t in (q._scale, q._shift)]
            return nbytes([*packed, *side, layer.keys, layer.values])

        return Side("QuantizedCache quanto int4", step, held)


def fitted(method: Method, shape: LayerShape) -> dict[str, Tensor]:
    """Random orthonormal bases: speed and bytes do not depend on what they hold."""
    if not isinstance(method, CSKV):
        return {}
    rank_k, rank_v = method.ranks(shape)
    groups = method.groups(shape)
    key = orthonormal(groups, shape.width // groups, rank_k, 0).float()
    value = orthonormal(1, shape.width, rank_v, 1).float()
    means = {"key_mean": torch.zeros(groups, shape.width // groups), "value_mean": torch.zeros(1, shape.width)}
    return {"key_up": key, "value_up": value, **means}


def measure(sides: list[Side], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each side, measured in turn, after one unmeasured round."""
    times: dict[str, list[float]] = {s.name: [] for s in sides}
    with torch.inference_mode():
        for round_ in range(repeats + 1):
            for side in sides:
                start = time.perf_counter()
                side.step()
                if round_:
                    times[side.name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quanto", action="store_true", help="also QuantizedCache (needs optimum-quanto)")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    case = Case(args.model, args.tokens, getattr(torch, args.dtype))
    with torch.inference_mode():
        sides = case.dense()
        if args.quanto:
            sides.append(case.quanto())
        sides += [
            case.shrunken("CSKV keep 0.2 int4", CSKV(keep=0.2, bits=4)),
            case.shrunken("CSKV keep 0.2 int4 group_heads 1", CSKV(keep=0.2, bits=4, group_heads=1)),
            case.shrunken("CSKV keep 0.2", CSKV(keep=0.2)),
            case.shrunken("RTN int4", RTN(bits=4)),
        ]
        errors = {s.name: s.check() for s in sides if s.check is not None}
    if wrong := {name: e for name, e in errors.items() if not e < 2e-2}:
        raise SystemExit(f"wrong attention output, no times: {wrong}")
    times = measure(sides, args.repeats)
    median = {name: statistics.median(t) for name, t in times.items()}
    baseline = median["DynamicCache + sdpa"]
    full = sides[0].held()
    rows = []
    for side in sides:
        t = times[side.name]
        rows.append(
            {
                "side": side.name,
                "ratio": round(median[side.name] / baseline, 4),
                "spread": [round(min(t) / baseline, 4), round(max(t) / baseline, 4)],
                "kept": round(side.held() / full, 4),
                "error": errors.get(side.name),
            }
        )
        print(f"{side.name:36s} {rows[-1]['ratio']:8.3f} x  {100 * rows[-1]['kept']:6.1f} % of bytes")
    record = {
        "what": "time of one layer's decode step / time of DynamicCache + sdpa, median of alternating runs",
        **{k: v for k, v in vars(args).items() if k != "out"},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    if "QuantizedCache quanto int4" in median:
        ours = median["CSKV keep 0.2 int4"]
        record["cskv_over_quanto"] = round(ours / median["QuantizedCache quanto int4"], 4)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
