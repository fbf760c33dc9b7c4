"""Decode of one layer: shrunken caches beside the full cache and transformers' own quantised caches, in turn.

    make bench                                               # CPU, some minutes, without peers
    python="$(bench/peers/make.sh quanto hqq)" && $python bench/decode.py --peers quanto hqq
    make bench-gpu                                           # on a machine with a GPU

A step is what a layer does for one new token: the cache's `update` and the attention over everything cached, or with
--attention-only the attention alone (on a GPU as one CUDA graph). Each contender is checked first, against
float32 attention over the same cache at full width (SALS as it reads all tokens); a wrong contender ends the run
without a time. On a CPU only the ratios are results. Each point is written to --out as soon as it is there, and at the
end the picture; run again to go on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import contenders
import torch
from layer import MODELS, Layer
from plot_decode import draw
from timing import against, bandwidth, captured, in_turn, setting

from kvshrink.eval.report.old_keys import renamed
from kvshrink.methods import build
from kvshrink.methods._roles import Method
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.rope_commuting import RopeCommuting
from kvshrink.methods.lowrank.sals import SALS
from kvshrink.methods.lowrank.spectral import Spectral
from kvshrink.methods.quant.exact import Full
from kvshrink.methods.quant.kivi import KIVI
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store import files

BASE = "DynamicCache + sdpa"
WRONG = 2e-2  # relative error of an output from which a contender is wrong
METHODS: dict[str, Method] = {
    "CSKV 0.2 int4 auto": CSKV(keep=0.2, bits=4, group_heads="auto"),
    "CSKV 0.2 auto": CSKV(keep=0.2, group_heads="auto"),
    "CSKV 0.2 int4 joint": CSKV(keep=0.2, bits=4),
    "RoPE-commuting 0.2 int4": RopeCommuting(keep=0.2, bits=4),
    "RoPE-commuting 0.2": RopeCommuting(keep=0.2),
    "SALS 0.2 int4, 1/8 of tokens": SALS(keep=0.2, bits=4, topk=0.125),
    "spectral 0.0625": Spectral(budget=0.0625, allocation="energy"),
    "spectral 0.0625 balanced": Spectral(budget=0.0625, allocation="energy", speed="balanced"),
    "spectral 0.0625 fast": Spectral(budget=0.0625, allocation="energy", speed="fast"),
    "full, in our pages": Full(),
    "KIVI int4": KIVI(bits=4),
    "KIVI int2": KIVI(bits=2),
    "RTN int4": RTN(bits=4),
}
QUANTISERS: dict[str, Method] = {
    "RTN int4": RTN(bits=4),
    "KIVI int4": KIVI(bits=4),
    "KIVI int2": KIVI(bits=2),
    "SAW-INT4": build("saw_int4", {}),
    "TurboQuant 4": build("turboquant", {"bits": 4}),
    "TurboQuant 3": build("turboquant", {"bits": 3}),
    "TurboQuant 2": build("turboquant", {"bits": 2}),
    "tcq 3": build("tcq", {"bits": 3}),
    "tcq 2": build("tcq", {"bits": 2}),
    "full, in our pages": Full(),
    "CSKV 0.29 TurboQuant 2": CSKV(keep=0.29, bits=2, codec="turboquant"),
    "FP8, in torch": build("fp8", {}),
    "NVFP4, in torch": build("nvfp4", {}),
    "Kitty, in torch": build("kitty", {}),
    "GEAR, in torch": build("gear", {}),
}
SOME = (
    *("CSKV 0.2 int4 auto", "CSKV 0.2 auto", "RoPE-commuting 0.2 int4", "RoPE-commuting 0.2", "KIVI int4"),
    *("full, in our pages", "spectral 0.0625", "spectral 0.0625 balanced", "spectral 0.0625 fast"),
)
KEEPS = {
    f"{name} {keep} int4": method(keep=keep, bits=4, **more)
    for keep in (0.1, 0.3, 0.5)
    for name, method, more in (("CSKV", CSKV, {"group_heads": "auto"}), ("RoPE-commuting", RopeCommuting, {}))
}
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 65536, 131072)
BATCHES = (4, 8, 16, 32)
BATCHED = 4096  # tokens of each row of a batch


def points(sweep: str, tokens: int, batch: int, contexts: Sequence[int]) -> list[tuple[int, int, dict[str, Method]]]:
    """(tokens, batch, methods): the main point, and what --sweep adds."""
    if sweep == "quantisers":
        return [(tokens, batch, QUANTISERS)]
    some = {name: METHODS[name] for name in SOME}
    found = [(tokens, batch, METHODS | (KEEPS if sweep in ("keep", "all") else {}))]
    if sweep in ("context", "all"):
        found += [(t, batch, some) for t in contexts if t != tokens]
    if sweep in ("batch", "all"):
        found += [(BATCHED, b, some) for b in BATCHES]
    return found


def measure(
    layer: Layer, methods: dict[str, Method], peers: list[str], rounds: int, attention_only: bool, read: float
) -> list[dict]:
    """Rows of one point; read: bytes per second. Raises SystemExit on a wrong output, without a time."""
    found = [contenders.growing(layer), *contenders.in_place(layer), *(contenders.quantized(layer, p) for p in peers)]
    found += [contenders.shrunken(layer, name, method) for name, method in methods.items()]
    errors = {contender.name: contender.error() for contender in found}
    if wrong := {name: round(e, 4) for name, e in errors.items() if not e < WRONG}:
        raise SystemExit(f"wrong attention output, no times: {wrong}")
    steps = {contender.name: contender.attend if attention_only else contender.step for contender in found}
    graphs: dict[str, bool] = {}
    if attention_only and layer.device.type == "cuda":
        for name, step in steps.items():
            steps[name], graphs[name] = captured(step)
    times = in_turn(steps, rounds, layer.device)
    dense = min((s.name for s in found if s.name.startswith("full")), key=lambda n: statistics.median(times[n]))
    full = found[0].held()
    rows = []
    for contender in found:
        floor = contender.held() / read
        rows.append(
            {
                "contender": contender.name,
                **against(times, contender.name, BASE),
                "over_best_dense": against(times, contender.name, dense),
                "byte_ratio": round(contender.held() / full, 4),
                "over_byte_floor": round(statistics.median(times[contender.name]) / floor, 2),
                "error": round(errors[contender.name], 5),
            }
        )
        if layer.device.type == "cuda":
            rows[-1]["microseconds"] = round(1e6 * statistics.median(times[contender.name]), 1)
            rows[-1]["graph"] = graphs.get(contender.name, False)
    for row in rows:
        row["best_dense"] = row["contender"] == dense
    return rows


def slopes(found: list[dict]) -> list[dict]:
    """How the time of a step grows with the context, by least squares, over the growth of two full caches.

    found: points of one batch, by context.
    """
    times: dict[str, list[tuple[int, float]]] = {}
    for point in found:
        for row in point["rows"]:
            # in readings of a full token's bytes, which are the same in all points of a run
            reads = row["over_byte_floor"] * row["byte_ratio"] * point["tokens"] * point["batch"]
            times.setdefault(row["contender"], []).append((point["tokens"], reads))
    grown = {
        name: statistics.linear_regression(*zip(*grows, strict=True)).slope
        for name, grows in times.items()
        if len(grows) == len(found) > 2
    }
    dense = min((name for name in grown if name.startswith("full")), key=lambda n: grown[n], default=None)
    ratios = {row["contender"]: row["byte_ratio"] for row in found[-1]["rows"]}
    return [
        {
            "contender": n,
            "over_base": round(g / grown[BASE], 4),
            "over": dense,
            "over_dense": round(g / grown[dense], 4),
            "byte_ratio": ratios[n],
        }
        for n, g in grown.items()
        if dense is not None
    ]


def show(point: dict) -> None:
    print(f"\n{point['tokens']} tokens, batch {point['batch']}")
    for row in point["rows"]:
        dense = row["over_best_dense"]["ratio"]
        print(
            f"  {row['contender']:34s} {row['ratio']:8.4f}x of {BASE} {dense:8.3f}x of the best dense "
            f"{100 * row['byte_ratio']:6.1f} % of bytes {row['over_byte_floor']:7.1f}x their reading"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="of --sweep context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=33, help="a page leaves the window in one of 32")
    parser.add_argument("--sweep", choices=["none", "context", "batch", "keep", "all", "quantisers"], default="none")
    parser.add_argument("--peers", nargs="*", choices=["quanto", "hqq"], default=[])
    parser.add_argument("--attention-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/results/decode.json"))
    args = parser.parse_args()
    if args.attention_only and args.peers:
        parser.error("a quantised cache of transformers has no attention of its own: leave out --peers")
    if args.tokens < 256 or args.batch < 1 or args.rounds < 1:
        parser.error("use --tokens of at least 256, --batch and --rounds of at least 1")
    device, contexts = torch.device(args.device), [int(n) for n in args.contexts.split(",")]
    asked = {k: v for k, v in vars(args).items() if k in ("model", "dtype", "device", "rounds", "attention_only")}
    record = {
        "what": f"time of one layer's decode step over that of {BASE}, and over the fastest full cache",
        "command": " ".join(["python", *sys.argv]),
        "asked": asked,
        "setting": setting(device),
        "bytes_per_second": bandwidth(device),
        "points": [],
    }
    if args.out.exists():
        before = renamed(json.loads(args.out.read_text()))
        if before.get("asked") == asked and before.get("setting") == record["setting"]:
            record |= {name: before[name] for name in ("bytes_per_second", "points")}
    done = {(p["tokens"], p["batch"]): {r["contender"] for r in p["rows"]} for p in record["points"]}
    with torch.inference_mode():
        for tokens, batch, methods in points(args.sweep, args.tokens, args.batch, contexts):
            peers = args.peers if (tokens, batch) == (args.tokens, args.batch) else []
            wanted = {*methods, *(f"QuantizedCache {p} int4" for p in peers)}
            if wanted <= done.get((tokens, batch), set()):
                continue
            record["points"] = [p for p in record["points"] if (p["tokens"], p["batch"]) != (tokens, batch)]
            layer = Layer(args.model, tokens, batch, getattr(torch, args.dtype), device)
            rows = measure(layer, methods, peers, args.rounds, args.attention_only, record["bytes_per_second"])
            record["points"].append({"tokens": tokens, "batch": batch, "rows": rows})
            show(record["points"][-1])
            files.write_json(args.out, record)
    alike = sorted((p for p in record["points"] if p["batch"] == args.batch), key=lambda p: p["tokens"])
    record["slopes"] = slopes(alike)
    files.write_json(args.out, record)
    draw(alike, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
