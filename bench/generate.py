"""Time of a new token in `generate` after the prompt: shrunken caches beside DynamicCache + sdpa, in turn.

    python bench/generate.py                      # writes bench/results/generate.json and .png
    python bench/generate.py --model smollm2 --tokens 256 1024 4096 8192 --out bench/results/generate_smollm2.json

A model of 4 layers with Llama-3.1-8B's attention shape and random weights, keys and values; or a real one, with methods
fitted to it and text in the cache. Every cache is filled with the same keys and values through its own `update`, as a
one-shot prefill would (see kvshrink.attach.fill: methods' prefills are the model's own). Then `model.generate` is timed
from its first new token to its last. A contender whose next logits with the fused kernel are not those of the reference
path ends the run (SALS reads single tokens without it, so that nothing differs). Run again to go on where it stopped.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from decode import METHODS
from models import artifact, random_model, real_model, text_ids
from timing import against, setting
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvshrink import make_cache
from kvshrink.attach import attach
from kvshrink.attach.fill import fill
from kvshrink.eval.report.old_keys import renamed
from kvshrink.eval.report.plots import pyplot, save
from kvshrink.eval.run import calibration
from kvshrink.fit.job import fit_all
from kvshrink.methods.artifact import Artifact
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

    def __init__(self, model: PreTrainedModel, cache: object, ids: torch.Tensor) -> None:
        self.model, self.cache, self.ids = model, cache, ids

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


@dataclass
class Setup:
    """Two models alike, the second of which is attached; what is in the cache; how methods are fitted."""

    plain: PreTrainedModel
    attached: PreTrainedModel
    ids: Callable[[int], torch.Tensor]
    full: Callable[[int], DynamicCache]
    artifacts: dict[str, Artifact]

    @classmethod
    def random(cls, dtype: torch.dtype) -> "Setup":
        plain, attached = (random_model(dtype, torch.device("cpu")) for _ in range(2))

        def ids(count: int) -> torch.Tensor:
            return torch.randint(1, 512, (1, count), generator=torch.Generator().manual_seed(0))

        made = {name: artifact(attached, method) for name, method in METHODS.items()}
        return cls(plain, attached, ids, lambda count: dense(plain, count), made)

    @classmethod
    def real(cls, name: str, dtype: torch.dtype) -> "Setup":
        """With a text in the cache, and methods fitted to it."""
        (plain, tokenizer), (attached, _) = (real_model(name, dtype) for _ in range(2))
        learns = {n: m for n, m in METHODS.items() if m.needs_fit}
        fits = fit_all(attached, list(learns.values()), calibration.texts(None), tokenizer, batch=4)
        made = {n: Artifact(m, {}) for n, m in METHODS.items()} | dict(zip(learns, fits, strict=True))

        def full(count: int) -> DynamicCache:
            found: DynamicCache = plain(text_ids(tokenizer, count), logits_to_keep=1).past_key_values
            return found

        return cls(plain, attached, lambda count: text_ids(tokenizer, count), full, made)


def measure(setup: Setup, tokens: int, rounds: int, count: int) -> list[dict]:
    plain, attached, ids = setup.plain, setup.attached, setup.ids(tokens + 1)
    attachment = attach(attached)
    found = {
        BASE: Contender(plain, setup.full(tokens), ids),
        "DynamicCache, attached": Contender(attached, setup.full(tokens), ids),
    }
    full = sum(t.nbytes for layer in found[BASE].cache.layers for t in (layer.keys, layer.values))
    for name, made in setup.artifacts.items():
        cache = make_cache(attached, made)
        fill(cache, found[BASE].cache, attachment)
        found[name] = Contender(attached, cache, ids)
    differences = {name: contender.difference() for name, contender in found.items()}
    if wrong := {name: round(d, 4) for name, d in differences.items() if not d < WRONG}:
        raise SystemExit(f"wrong logits, no times: {wrong}")
    times: dict[str, list[float]] = {name: [] for name in found}
    for round_ in range(rounds + 1):
        for name, contender in found.items():
            seconds = contender.seconds(count)
            if round_:
                times[name].append(seconds)
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
    dtype, setup = getattr(torch, args.dtype), None
    for tokens in args.tokens:
        if tokens in [p["tokens"] for p in record["points"]]:
            continue
        if setup is None:
            setup = Setup.random(dtype) if args.model is None else Setup.real(args.model, dtype)
        with torch.inference_mode():
            rows = measure(setup, tokens, args.rounds, args.count)
        record["points"].append({"tokens": tokens, "rows": rows})
        files.write_json(args.out, record)
        print(f"\n{tokens} tokens")
        for row in rows:
            print(f"  {row['contender']:34s} {row['faster']:8.2f}x as fast {100 * row['byte_ratio']:6.1f} % of bytes")
    draw(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
