"""Time of a new token in `generate` after the prompt: shrunken caches beside DynamicCache + sdpa, in turn.

    python bench/generate.py                      # writes bench/results/generate.json and .png
    python bench/generate.py --model smollm2 --tokens 256 1024 4096 8192 --out bench/results/generate_smollm2.json

A model of 4 layers with Llama-3.1-8B's attention shape and random weights, or a real one as large as it is. Every cache
is filled with the same random keys and values through its own `update`, as a one-shot prefill would (see
kvshrink.attach.fill: methods' prefills are the model's own). Then `model.generate` is timed from its first new token to
its last. A contender whose next logits with the fused kernel are not those of the reference path ends the run (SALS
reads single tokens without it, so that nothing differs). Run again to go on where it stopped.
"""

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path

import torch
from decode import METHODS
from models import artifact, model_of
from timing import against, setting
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from kvshrink import make_cache
from kvshrink.attach import attach
from kvshrink.attach.fill import fill
from kvshrink.eval.report.old_keys import renamed
from kvshrink.eval.report.plots import pyplot, save
from kvshrink.store import files

BASE = "DynamicCache + sdpa"
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
WRONG = 5e-2  # relative difference of logits, after four layers that may each differ by bench/decode.py's WRONG


class Stopwatch(BaseStreamer):
    """When `generate` gave out its prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Contender:
    """A model and its cache; `seconds` generates some tokens more and gives the time of one."""

    def __init__(self, model: LlamaForCausalLM, cache: object, tokens: int) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.randint(1, 512, (1, tokens + 1), generator=torch.Generator().manual_seed(0))

    def seconds(self, count: int) -> float:
        watch = Stopwatch()
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=count + 1,
            do_sample=False,
            streamer=watch,
        )
        return (watch.times[-1] - watch.times[1]) / count

    def difference(self) -> float:
        """Of the next logits with fused kernels from those of the reference path, relative."""
        found = []
        for reference in ("0", "1"):
            os.environ["KVSHRINK_REFERENCE"] = reference
            out = self.model(self.ids[:, -1:], past_key_values=copy.deepcopy(self.cache))
            found.append(out.logits.float())
        del os.environ["KVSHRINK_REFERENCE"]
        return float((found[0] - found[1]).norm() / found[1].norm())


def dense(model: LlamaForCausalLM, tokens: int) -> DynamicCache:
    """A full cache of random keys and values, the same at each call."""
    config, cache = model.config, DynamicCache(config=model.config)
    g = torch.Generator().manual_seed(0)
    for i in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        keys, values = (torch.randn(shape, generator=g).to(model.dtype) for _ in range(2))
        cache.update(keys, values, i)
    return cache


def measure(tokens: int, rounds: int, count: int, dtype: torch.dtype, name: str | None = None) -> list[dict]:
    plain, attached = (model_of(dtype, torch.device("cpu"), name) for _ in range(2))
    attachment = attach(attached)
    found = {
        BASE: Contender(plain, dense(plain, tokens), tokens),
        "DynamicCache, attached": Contender(attached, dense(plain, tokens), tokens),
    }
    for name, method in METHODS.items():
        cache = make_cache(attached, artifact(attached, method))
        fill(cache, found[BASE].cache, attachment)
        found[name] = Contender(attached, cache, tokens)
    differences = {name: contender.difference() for name, contender in found.items()}
    if wrong := {name: round(d, 4) for name, d in differences.items() if not d < WRONG}:
        raise SystemExit(f"wrong logits, no times: {wrong}")
    times: dict[str, list[float]] = {name: [] for name in found}
    for round_ in range(rounds + 1):
        for name, contender in found.items():
            seconds = contender.seconds(count)
            if round_:
                times[name].append(seconds)
    full = sum(t.nbytes for layer in dense(plain, tokens).layers for t in (layer.keys, layer.values))
    return [
        {
            "contender": name,
            "faster": round(1 / (row := against(times, name, BASE))["ratio"], 3),
            **row,
            "byte_ratio": round(contender.cache.nbytes / full, 4) if name in METHODS else 1.0,
            "difference": round(differences[name], 5),
        }
        for name, contender in found.items()
    ]


def draw(record: dict, path: Path) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    names = [r["contender"] for r in record["points"][0]["rows"]]
    for n, name in enumerate(names):
        y = [next(r["faster"] for r in p["rows"] if r["contender"] == name) for p in record["points"]]
        axis.plot(
            [p["tokens"] for p in record["points"]], y, marker="o", ms=4, label=name, color="k" if not n else None
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.set_xlabel("tokens in the cache")
    axis.set_title("tokens per second of generate's decode phase / those of DynamicCache + sdpa", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--model", help="as the commands' --model; without it four layers of Llama-3.1-8B's shape")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=16, help="new tokens of a round")
    parser.add_argument("--out", type=Path, default=Path("bench/results/generate.json"))
    args = parser.parse_args()
    if min(args.tokens) < 1 or args.rounds < 1 or args.count < 1:
        parser.error("use --tokens, --rounds and --count of at least 1")
    asked = {k: v for k, v in vars(args).items() if k in ("dtype", "rounds", "count")}
    if args.model is not None:
        asked["model"] = args.model
    record = {
        "what": f"time of a new token in generate over that of {BASE}; `faster` is its inverse",
        "command": " ".join(["python", *sys.argv]),
        "asked": asked,
        "setting": setting(torch.device("cpu")),
        "points": [],
    }
    if args.out.exists():
        before = renamed(json.loads(args.out.read_text()))
        if before.get("asked") == asked and before.get("setting") == record["setting"]:
            record["points"] = before["points"]
    for tokens in args.tokens:
        if tokens in [p["tokens"] for p in record["points"]]:
            continue
        with torch.inference_mode():
            rows = measure(tokens, args.rounds, args.count, getattr(torch, args.dtype), args.model)
        record["points"].append({"tokens": tokens, "rows": rows})
        files.write_json(args.out, record)
        print(f"\n{tokens} tokens")
        for row in rows:
            print(f"  {row['contender']:34s} {row['faster']:8.2f}x as fast {100 * row['byte_ratio']:6.1f} % of bytes")
    draw(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
