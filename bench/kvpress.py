"""Token methods beside NVIDIA's kvpress, on the same prompts of the same model: scores, live bytes, time of a step.

    bench/peers/make.sh kvpress && python bench/kvpress.py --model smollm2 --out docs/results/kvpress

kvpress answers in its own environment, by its own pipeline (bench/peers/kvpress_answers.py); ours by kvshrink's runner.
The context is compressed before the question is seen, unless --seen. Two rows of ours stand beside each of theirs: at
the same nominal share of tokens, and at that share of real bytes (window, sinks and index counted). Differences are
paired by prompt, with a bootstrap's 95 % interval. Times are of a decode step over that of an uncompressed cache under
kvpress, ours too: one machine, one torch, one after the other. Run again to resume.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from series import seen
from timing import setting
from tqdm import tqdm

from kvshrink import make_cache
from kvshrink.attach import attach
from kvshrink.attach.budget import at_byte_ratio
from kvshrink.attach.fill import fill, prefill, wanted_by
from kvshrink.cli._common import load, model_name
from kvshrink.eval import metrics
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import Entry, parse
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.eval.run.stats import bootstrap
from kvshrink.store import files
from kvshrink.store.log import Log

PEER = Path(__file__).parent / "peers" / "kvpress"
TASKS = ("needle", "needle_among", "ruler/niah_single_1", "ruler/niah_single_2[books]", "longeval/filled")
OURS = {  # of each press, ours with its settings
    "snapkv": "snapkv:observed=64,pool=5",
    "pyramidkv": "pyramidkv:observed=64,pool=5",
    "tova": "tova",
    "knorm": "knorm",
    "keydiff": "keydiff",
    "lagkv": "lagkv",
    "streaming_llm": "streaming_llm",
    "expected_attention": "expected_attention",
    "adakv snapkv": "snapkv:observed=64,pool=5,floor=0.2",
    "adakv expected_attention": "expected_attention:floor=0.2,epsilon=0.01",
    "kvzip": "kvzip",
}
BESIDE = ("turboquant:bits=4", "turboquant:bits=2")  # what a quantiser does in so many bytes


def prompts(args: argparse.Namespace, model, tokenizer) -> list:
    """(task, sample) of every prompt."""
    found, skipped = gather(choices(args.tasks), [args.length], args.cases, 0, tokenizer, args.model == "reference")
    assert not skipped, skipped
    if args.seen:
        for task in found:
            task.samples[:] = [seen(s) for s in task.samples]
    every = [(n, task, s) for task in found for n, s in enumerate(task.samples)]
    return [(task, s) for _, task, s in sorted(every, key=lambda x: x[0])]  # a run that is cut short has all tasks


def ask_peer(args: argparse.Namespace, asked: list, tokenizer, dtype: torch.dtype) -> list[dict]:
    """kvpress's rows."""
    given = {
        "model": model_name(args.model),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kept": args.kept,
        "presses": list(OURS),
        "prompts": [],
    }
    for n, (_, sample) in enumerate(asked):
        context, question = encode(sample, tokenizer)
        given["prompts"].append({"id": n, "context": context, "question": question, "new": sample.max_new_tokens})
    args.out.mkdir(parents=True, exist_ok=True)
    name = "seen" if args.seen else "unseen"
    where, out = args.out / f"prompts_{name}.json", args.out / f"peer_{name}.jsonl"
    where.write_text(json.dumps(given))
    python = PEER / "venv" / "bin" / "python"
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # it has an environment of its own
    subprocess.run([python, PEER.parent / "kvpress_answers.py", where, out], check=True, env=own)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        if "answer" in row:
            row["score"] = metrics.score(asked[row["prompt"]][1], row["answer"])
    return rows


def entries(args: argparse.Namespace, model) -> list[Entry]:
    """Ours at the same nominal share, and at that share of real bytes."""
    found = [parse("full")]
    for kept in args.kept:
        for press, text in OURS.items():
            method = parse(text).method
            for kind in ("nominal", "bytes"):
                if kind == "nominal":
                    if press == "streaming_llm":
                        own = SimpleNamespace(method=type(method)(window=int(kept * args.length) - 36))
                    else:
                        own = parse(f"{text}{',' if ':' in text else ':'}ratio={kept}")
                else:
                    own = at_byte_ratio(method, kept, model, args.length)
                found.append(Entry(f"{press} @{kept} {kind}", own.method, series=press, target=kept))
    return found + [parse(text) for text in BESIDE]


def steps(model, tokenizer, asked: list, every: list[Entry]) -> dict[str, float]:
    """Seconds of a decode step, one prompt."""
    import copy
    import statistics
    import time

    ids = torch.tensor([encode(asked[0][1], tokenizer)[0]])
    dense = prefill(model, ids, wanted=wanted_by(e.method for e in every))
    found = {}
    with torch.inference_mode():
        for entry in tqdm(every, desc="steps"):
            cache = copy.deepcopy(dense)
            if entry.method is not None:
                cache = make_cache(model, entry.method)
                fill(cache, dense, attach(model))
            times = []
            for _ in range(8):
                started = time.perf_counter()
                model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
                times.append(time.perf_counter() - started)
            found[entry.label] = statistics.median(times[1:])
    return found


def table(args: argparse.Namespace, asked: list, theirs: list[dict], ours: dict, times: dict) -> list[dict]:
    """A row for each press, share and side."""
    full = [r for r in theirs if r["press"] == "full"]
    whole, rows = sum(r["nbytes"] for r in full), []
    prefill_full = np.mean([r["prefill"] for r in full])
    step_full = next(r["step"] for r in full if "step" in r)
    times = {label: round(seconds / step_full, 3) for label, seconds in times.items()}

    def row(
        press: str, kept: float, side: str, hits: list[float], share: float, step: float | None, beside: list | None
    ) -> None:
        low, high = bootstrap(hits, 0)
        found = {"press": press, "kept": kept, "side": side, "score": round(float(np.mean(hits)), 4)}
        found |= {"low": round(low, 4), "high": round(high, 4), "bytes": round(share, 4)} | (
            {} if step is None else {"step": step}
        )
        if beside is not None:
            delta = [a - b for a, b in zip(hits, beside, strict=True)]
            low, high = bootstrap(delta, 0)
            found |= {
                "delta": round(float(np.mean(delta)), 4),
                "delta_low": round(low, 4),
                "delta_high": round(high, 4),
            }
        rows.append(found)

    for label in ["full", *(parse(text).label for text in BESIDE)]:
        own = ours[label]
        row(
            label,
            1.0,
            "kvshrink",
            [o.score for o in own],
            sum(o.nbytes for o in own) / sum(o.full for o in own),
            times.get(label),
            None,
        )
    scores = [r["score"] for r in sorted(full, key=lambda r: r["prompt"])]
    row("full", 1.0, "kvpress", scores, 1.0, 1.0 if times else None, None)
    for kept in args.kept:
        for press in OURS:
            own = sorted((r for r in theirs if (r["press"], r["kept"]) == (press, kept)), key=lambda r: r["prompt"])
            failed = next((r["error"] for r in own if "error" in r), None)
            hits = None if failed else [r["score"] for r in own]
            if hits is None:
                rows.append({"press": press, "kept": kept, "side": "kvpress", "error": failed})
            else:
                step = round(next(r["step"] for r in own if "step" in r) / step_full, 3) if times else None
                row(press, kept, "kvpress", hits, sum(r["nbytes"] for r in own) / whole, step, None)
                if times:
                    rows[-1]["prefill"] = round(float(np.mean([r["prefill"] for r in own]) / prefill_full), 3)
            for kind in ("nominal", "bytes"):
                got = ours[f"{press} @{kept} {kind}"]
                share = sum(o.nbytes for o in got) / sum(o.full for o in got)
                row(
                    press,
                    kept,
                    f"kvshrink, {kind}",
                    [o.score for o in got],
                    share,
                    times.get(f"{press} @{kept} {kind}"),
                    hits,
                )
    return rows


def page(record: dict) -> str:
    lines = ["| press | kept | side | score | difference to kvpress | bytes held | a step |", "| --- " * 7 + "|"]
    for r in record["rows"]:
        if "error" in r:
            lines.append(f"| {r['press']} | {r['kept']:.3g} | {r['side']} | fails: {r['error'][:80]} | | | |")
            continue
        delta = f"{r['delta']:+.3f} ({r['delta_low']:+.3f} to {r['delta_high']:+.3f})" if "delta" in r else ""
        score = f"{r['score']:.3f} ({r['low']:.2f}-{r['high']:.2f})"
        cells = [
            r["press"],
            f"{r['kept']:.3g}",
            r["side"],
            score,
            delta,
            f"{100 * r['bytes']:.1f} %",
            f"{r['step']:.2f}" if "step" in r else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--seen", action="store_true", help="the question is compressed with the context")
    parser.add_argument("--no-steps", action="store_true", help="without times: for a machine that is not quiet")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kvpress"))
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    asked = prompts(args, model, tokenizer)
    theirs = ask_peer(args, asked, tokenizer, next(model.parameters()).dtype)
    every = entries(args, model)
    log = Log(args.out / f"ours_{'seen' if args.seen else 'unseen'}.jsonl")
    ours: dict[str, list] = {e.label: [] for e in every}
    bar = tqdm(total=len(every) * len(asked), unit="answer")
    for task in dict.fromkeys(id(t) for t, _ in asked):
        own = next(t for t, _ in asked if id(t) == task)
        for outcome in Runner(model, tokenizer, every).run(Job(own.title, length=args.length), own.samples, log, bar):
            ours[outcome.method].append(outcome)
    order = list(dict.fromkeys(task.title for task, _ in asked))
    for found in ours.values():  # as kvpress answers: all tasks' first prompts, then the second ones
        found.sort(key=lambda o: (o.index, order.index(o.task)))
        assert [list(o.expected) for o in found] == [list(sample.answers) for _, sample in asked]
    times = {} if args.no_steps else steps(model, tokenizer, asked, every)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "setting": setting(torch.device("cpu")),
        "kvpress": "0.5.5, transformers 5.2.0",
        "prompts": len(asked),
        "rows": table(args, asked, theirs, ours, times),
    }
    name = "seen" if args.seen else "unseen"
    files.write_json(args.out / f"{name}.json", record)
    (args.out / f"{name}.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
