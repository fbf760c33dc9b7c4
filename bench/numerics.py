"""How exact the CPU's decode kernels are: a step of a bfloat16 model beside float64 over the same decoded codes.

    python bench/numerics.py --out bench/results/numerics.json

One layer of Llama-3.1-8B's shape. Heads are "flat" (a query of a hundredth: all tokens alike), "random", "peaked" (a
query that finds one token) and "sinks" (one that finds the first four, which are exact, and little else). error: the
largest difference of an output over the largest output, of all query heads, before it is rounded to bfloat16. bound:
what roundings of factors to bfloat16 can add up to at worst: e^(2 d) - 1 for weights, where d is 2^-8 of the largest
sum of |q k| of a token, and 2^-8 for weights and values, times the largest value over the largest output.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layer import Layer, fitted
from torch import Tensor
from tqdm import tqdm

from kvshrink.cache import KVCache
from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.step import SNAPSHOT
from kvshrink.methods import build
from kvshrink.methods._roles import Method
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.rope_commuting import RopeCommuting
from kvshrink.methods.lowrank.spectral import Spectral
from kvshrink.methods.quant.exact import Full
from kvshrink.store import files
from kvshrink.store.tokens import TokenTable

CONTEXTS = (1024, 8192, 32768, 131072)
EPS = 2.0**-8  # of a product of two numbers rounded to bfloat16
METHODS: dict[str, Method] = {
    "full, in our pages": Full(),
    "RTN int4": build("rtn", {"bits": 4}),
    "TurboQuant 3": build("turboquant", {"bits": 3}),
    "tcq 2": build("tcq", {"bits": 2}),
    "RoPE-commuting 0.2 int4": RopeCommuting(keep=0.2, bits=4),
    "CSKV 0.2 int4": CSKV(keep=0.2, bits=4),
    "spectral 0.0625": Spectral(budget=0.0625, allocation="energy"),
    "spectral 0.0625 balanced": Spectral(budget=0.0625, allocation="energy", speed="balanced"),
    "spectral 0.0625 fast": Spectral(budget=0.0625, allocation="energy", speed="fast"),
}


def queries(layer: Layer) -> dict[str, Tensor]:
    """Of each kind of head, [b, q, 1, d]. The first four keys of the layer are made alike, for "sinks" to find."""
    found = layer.keys[:, :, :1].repeat_interleave(layer.q_heads // layer.heads, 1)
    layer.keys[:, :, :4] = layer.keys[:, :, :1]
    middle = layer.tokens // 2
    other = layer.keys[:, :, middle : middle + 1].repeat_interleave(layer.q_heads // layer.heads, 1)
    random = layer.query
    return {"flat": random / 100, "random": random, "peaked": other * 2, "sinks": found + random / 4}


def read(layer: Layer, method: Method) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(returned keys and values, all keys and values at full width in float64) of a step behind the layer's tokens."""
    shape = layer.shape
    learnt = fitted(method, shape) if method.needs_fit else {}
    table = TokenTable()
    compressed = CompressedLayer(method, shape, method.tiers(shape, learnt), table)
    cache = KVCache([compressed], method, table, "bench", "bench")
    for keys, values in ((layer.keys, layer.values), (layer.key, layer.value)):
        positions = torch.arange(compressed.seen, compressed.seen + keys.shape[2], dtype=torch.int32)
        cache.stage(0, positions[None], None, layer.rope, True, "bench")
        returned = cache.update(keys, values, 0)
    snapshot = getattr(returned[0], SNAPSHOT)
    own = returned if snapshot.held is None else snapshot.held.rows()
    sinks = snapshot.sinks
    sinks = sinks and sinks._replace(keys=sinks.keys.double(), values=sinks.values.double())
    first = snapshot.seen - own[0].shape[2]
    whole = rebuild(replace(snapshot, held=None, first=first, sinks=sinks), *(x.double() for x in own))
    return *returned, *whole


def compared(layer: Layer, query: Tensor, read_: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """error and bound of one kind of head, the worst of all."""
    keys, values, all_keys, all_values = read_
    got = attend(query.float(), keys, values, None, layer.d**-0.5, None, getattr(keys, SNAPSHOT))
    group, errors, bounds = layer.q_heads // layer.heads, [], []
    for h in range(layer.heads):
        k, v = all_keys[0, h], all_values[0, h]
        q = query[0, h * group : (h + 1) * group, 0].double() * layer.d**-0.5
        exact = (q @ k.T).softmax(-1) @ v
        own = got[0, h * group : (h + 1) * group, 0].double()
        largest = exact.abs().amax(-1)
        errors.append(((own - exact).abs().amax(-1) / largest).max())
        worst = EPS * (q.abs() @ k.abs().T).amax(-1)
        bounds.append(((torch.expm1(2 * worst) + EPS) * v.abs().max() / largest).max())
    return {"error": float(torch.stack(errors).max()), "bound": float(torch.stack(bounds).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/numerics.json"))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    bar = tqdm([(int(t), name) for t in args.contexts.split(",") for name in METHODS], unit="cache")
    with torch.inference_mode():
        for tokens, name in bar:
            layer = Layer("llama-3.1-8b", tokens, 1, torch.bfloat16, torch.device("cpu"))
            asked = queries(layer)
            found = read(layer, METHODS[name])
            for kind, query in asked.items():
                own = {k: float(f"{x:.3g}") for k, x in compared(layer, query, found).items()}
                rows.append({"method": name, "tokens": tokens, "heads": kind, **own})
            files.write_json(args.out, {"command": "python bench/numerics.py", "rows": rows})
    for name in METHODS:
        own = [r for r in rows if r["method"] == name]
        worst = max(own, key=lambda r: r["error"])
        print(
            f"{name:28s} {worst['error']:.4f} ({worst['heads']}, {worst['tokens']} tokens, bound {worst['bound']:.2f})"
        )


if __name__ == "__main__":
    main()
