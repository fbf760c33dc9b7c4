"""kvshrink in vLLM on a CPU: the same tokens, the bytes, the time, and a store of prefixes under all that may happen.

    make serve-vllm                    # its environment, then this; writes bench/results/serve_vllm.json

SmolLM2-135M-Instruct, one thread, engines one after the other in one process; what must be another process is. Parts:
parity, window, prefixes, ranks, capacity, speed, store, server. Rows that hold are marked; it fails if one does not.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ.update({k: v for k, v in SETTINGS.items() if k not in os.environ})
sys.path.append(str(Path(__file__).parents[1]))  # what benchmarks share

import torch  # noqa: E402
from timing import setting  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

import kvshrink  # noqa: E402
from kvshrink.cli._common import model_name  # noqa: E402
from kvshrink.data import path  # noqa: E402
from kvshrink.eval.run.entries import parse  # noqa: E402
from kvshrink.store import files  # noqa: E402

MODEL = model_name("smollm2")
FITTED = {  # artifacts, fitted here once
    "cskv 16": kvshrink.CSKV(keep=0.25, window_bits=None),
    "cskv 4": kvshrink.CSKV(keep=0.25, bits=4, window_bits=None),
    "spectral": kvshrink.Spectral(budget=0.0625, speed="fast", window_bits=None),  # of float32: 12.5 % of bfloat16
}
DENSE = 23040  # bytes of a token in bfloat16


class Table:
    """Rows as they come. check: whether what must hold does; None: a figure."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, what: str, found: Any, wanted: str = "", check: bool | None = None) -> None:
        mark = {True: "holds", False: "FELL SHORT", None: ""}[check]
        self.rows.append({"part": part, "what": what, "found": found, "wanted": wanted, "holds": check})
        print(f"{part:9} {what:62} {found!s:38} {wanted:28} {mark}", flush=True)


def ids(count: int, first: int = 0) -> list[int]:
    return TOKENS[first : first + count]


TOKENS: list[int] = AutoTokenizer.from_pretrained(MODEL)(path("heldout.txt").read_text())["input_ids"]


def engine(kvshrink_settings: dict | None = None, **given: Any) -> LLM:
    more = {} if kvshrink_settings is None else {"additional_config": {"kvshrink": kvshrink_settings}}
    own = {"dtype": "float32", "max_model_len": 2048, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}
    fixed = {"enforce_eager": True, "block_size": 32, "distributed_executor_backend": "uni", "disable_log_stats": True}
    return LLM(model=MODEL, seed=0, **{**fixed, **own, **given}, **more)


def closed(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def generate(llm: LLM, prompts: list[list[int]], count: int, **more: Any) -> list[list[int]]:
    given = [{"prompt_token_ids": p, **more} for p in prompts]
    out = llm.generate(given, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
    return [list(x.outputs[0].token_ids) for x in out]


def same(one: list[list[int]], other: list[list[int]]) -> list[int]:
    """Tokens up to the first difference."""
    pairs = zip(one, other, strict=True)
    return [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs]


def named(name: str, folder: Path) -> tuple[dict[str, str], Any]:
    """(settings of the engine, method for transformers' side)."""
    if name not in FITTED:
        return {"method": name}, parse(name).method
    where = folder / name.replace(" ", "_")
    if not where.is_dir():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        text = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(path("calibration.txt").read_text())["input_ids"])
        kvshrink.fit(model, FITTED[name], text[: 16 * 1024].view(16, 1024), progress=False).save_pretrained(where)
    return {"artifact": str(where)}, kvshrink.Artifact.from_pretrained(where)


def parity(table: Table, folder: Path) -> None:
    """Float32, prompts in one step: the tokens of our transformers path."""
    prompts, count = [ids(200 + 17 * i, 300 * i) for i in range(3)], 24
    hf = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for name in (*FITTED, "turboquant:bits=4", "kivi:bits=4"):
        settings, method = named(name, folder)
        want = []
        for prompt in prompts:
            x, cache = torch.tensor([prompt]), kvshrink.make_cache(hf, method)
            made = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            y = hf.generate(x, attention_mask=torch.ones_like(x), past_key_values=cache, **made)
            want.append(y[0, len(prompt) :].tolist())
        llm = engine(settings)
        found = same(generate(llm, prompts, count), want)
        closed(llm)
        table.add("parity", f"{name}, 4 sinks", found, f"3 x {count} tokens equal", min(found) == count)


def window(table: Table, folder: Path) -> None:
    """prefill="window": the same tokens whatever the steps, a prefix that is there already, or a request put back."""
    settings = {"method": "turboquant:bits=4", "sinks": 0, "prefill": "window"}
    long = [ids(200 + 30 * i, 500 * i) for i in range(4)], 24
    short = [ids(40, 300 * i) for i in range(4)], 110  # that outgrow a small pool
    small = {"max_model_len": 256, "max_num_batched_tokens": 256}
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "in one step": (long, {}),
        "in steps of 64": (long, {"max_num_batched_tokens": 64}),
        "a prefix hit": (long, {"enable_prefix_caching": True}),
        "in one step, short": (short, {}),
        "put back": (short, {"num_gpu_blocks_override": 130, "disable_log_stats": False} | small),
    }
    known: dict[int, list[list[int]]] = {}
    for way, ((prompts, count), more) in ways.items():
        llm = engine(settings, **({"max_model_len": 512, "max_num_batched_tokens": 512} | more))
        found, times = generate(llm, prompts, count), 1
        if way == "a prefix hit":  # more of them: prefixes
            found = generate(llm, prompts, count)
        if way == "put back":
            times = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        closed(llm)
        equal = same(found, known.setdefault(count, found))
        note = f"{times:.0f} times, " if way == "put back" else ""
        table.add("window", way, f"{note}{equal}", f"4 x {count} tokens equal", min(equal) == count and times > 0)


def speed(table: Table, folder: Path) -> None:
    """Generated tokens a CPU second, beside dense vLLM in turn: 33 tokens with their prompts; then the last 32 alone,
    behind prompts that are in the prefix cache."""
    contenders = {"dense": None, "turboquant 4": {"method": "turboquant:bits=4", "sinks": 0}}
    contenders["spectral"] = {**named("spectral", folder)[0], "sinks": 0}
    for context, n in ((256, 8), (256, 32), (4096, 8)):
        dense = (0.0, 0.0)
        for name, settings in contenders.items():
            sizes = {"max_model_len": context + 64, "max_num_batched_tokens": 4096}
            llm = engine(settings, dtype="bfloat16", enable_prefix_caching=True, **sizes)
            generate(llm, [ids(64)], 2)
            prompts = [ids(context, 100 * i) for i in range(n)]
            first, one, all_ = (cpu_of(partial(generate, llm, prompts, k)) for k in (33, 1, 33))
            closed(llm)
            found = n * 33 / first, n * 32 / (all_ - one)
            dense = found if settings is None else dense
            shares = tuple(round(x / y, 2) for x, y in zip(found, dense, strict=True))
            least = 0.8 if context == 256 else 1.0
            wanted = ("", None) if settings is None else (f"{least} of dense", shares[1] >= least)
            table.add("speed", f"{name}, {n} requests of {context}: with prompts, without", shares, *wanted)


def cpu_of(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def main() -> None:
    from serve_vllm_prefixes import prefixes
    from serve_vllm_ranks import ranks
    from serve_vllm_store import capacity, server, store

    parts = {f.__name__: f for f in (parity, window, prefixes, ranks, capacity, speed, store, server)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--folder", type=Path, default=Path("runs/serve_vllm"), help="for artifacts and stores")
    parser.add_argument("--out", type=Path, default=Path("bench/results/serve_vllm.json"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    table, known = Table(), json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for name in args.parts:
        begun = time.process_time()
        parts[name](table, args.folder)
        print(f"{name}: {time.process_time() - begun:.0f} CPU seconds", flush=True)
        where = setting(torch.device("cpu"))
        for row in table.rows:  # parts may be run apart, of other sources, on other processors
            row.update({key: row.get(key, where[key]) for key in ("source", "device")})
        new = {(row["part"], row["device"]) for row in table.rows}
        rows = [row for row in known if (row["part"], row["device"]) not in new] + table.rows
        files.write_json(args.out, {"command": "make serve-vllm", "setting": where, "rows": rows})
    if short := [row for row in table.rows if row["holds"] is False]:
        sys.exit(f"{len(short)} of {len(table.rows)} rows fell short")


if __name__ == "__main__":
    main()
