"""Accuracy at equal memory: retrieval and held-out text, on the bundled reference model or a real one.

    python bench/equal_bytes.py --out docs/results/equal_bytes
    python bench/equal_bytes.py --model smollm2 --lengths 2048 --out docs/results/smollm2

Every byte counts (codes, scales, window, sinks, positions). The context is compressed before the question is seen.
Each method's budget setting is the largest under a budget; one that cannot come within 5 % of it has its
nearest and is marked. KL and top-1 agreement are over question and answer tokens (retrieval), and over the last
128 tokens of held-out book text, 32 a forward. Run again to resume.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plot_equal_bytes import draw
from tqdm import tqdm

from kvshrink import CSKV, RTN, Spectral, methods
from kvshrink.attach.budget import at_byte_ratio
from kvshrink.attach.factory import digest_of
from kvshrink.attach.identity import model_key
from kvshrink.cli._common import load
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import held_out
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.eval.run.stats import bootstrap, student
from kvshrink.eval.run.teacher import follow
from kvshrink.store import files
from kvshrink.store.log import Log, key_of

BUDGETS = (0.2, 0.125, 0.0625, 0.04)
DIVERGED = 8  # samples of each task whose KL is measured
TASKS = ("needle", "needle_among", "passkey/book", "longeval/filled")
REAL_TASKS = ("needle", "needle_among", "ruler/niah_single_1", "ruler/niah_single_2[books]")  # what SmolLM2 can do
SCORED = 128
MAIN = "spectral"


def series(steps: int) -> dict[str, Any]:
    """Label to method. The first are compared in answers too, the others (how it is fitted) in KL only."""
    return {
        MAIN: Spectral(),
        "CSKV pca int4": CSKV(bits=4),
        "CSKV paper int4": CSKV.paper(bits=4, steps=steps),
        "KIVI": methods.build("kivi", {}),
        "int4": RTN(bits=4),
        "int3": RTN(bits=3),
        "int2": RTN(bits=2),
        "StreamingLLM": methods.build("streaming_llm", {}),
        "spectral, scalar": Spectral(code="scalar"),
        "spectral, uniform": Spectral(allocation="uniform"),
        "spectral, energy": Spectral(allocation="energy"),
        "spectral, query + output": Spectral(key_metric="query", value_metric="output"),
        "spectral, unrotated": Spectral(rotate=False),
        "spectral, no 1 bit": Spectral(widths=(2, 3, 4, 8)),
        "CSKV pca int4, query + output": CSKV(bits=4, key_metric="query", value_metric="output"),
    }


def real_series(steps: int) -> dict[str, Any]:
    """What is compared on a real model, the first ones in answers too."""
    fixed = {f"{name} {b}": methods.build(name, {"bits": b}) for name in ("tcq", "turboquant") for b in (3, 2, 4)}
    others = {
        "kvarn 4": {},
        "kvarn 2": {"bits": 2, "value_bits": None},
        "oscar 2": {"bits": 2},
        "kvquant 2": {"bits": 2},
    }
    return {
        MAIN: Spectral(),
        "CSKV budget": CSKV(budget=0.1),
        "StreamingLLM": methods.build("streaming_llm", {}),
        **fixed,
        "CSKV pca int4": CSKV(bits=4),
        "int4": RTN(bits=4),
        **{label: methods.build(label[:-2], settings) for label, settings in others.items()},
        "spectral, balanced": Spectral(speed="balanced"),
        "spectral, fast": Spectral(speed="fast"),
        "spectral, exact window": Spectral(window_bits=None),
        "spectral, scalar": Spectral(code="scalar"),
        "CSKV budget, int4": CSKV(budget=0.1, bits=4),
        "CSKV paper int4": CSKV.paper(bits=4, steps=steps),
    }


ANSWERED = 8, 6  # series whose answers are compared, of the bundled model and of a real one
FIXED = re.compile(r"(int|tcq |turboquant |kvquant |kvarn |oscar )\d")  # at their own bytes


def plan(model, length: int, named: dict[str, Any], only: list[str]) -> list[Entry]:
    """Every series (or those of `only`) at every budget, at this length."""
    out = []
    for label, method in named.items():
        if only and label not in only:
            continue
        if FIXED.fullmatch(label):
            out.append(Entry(label, method, None, label, None, True, f"bits={method.bits}"))
            continue
        for budget in BUDGETS:
            at = at_byte_ratio(method, budget, model, length)
            setting = f"{method.budget_setting}={getattr(at.method, method.budget_setting):.4g}"
            out.append(Entry(f"{label} @{budget:g}", at.method, None, label, budget, at.reached, setting))
    return out


def compared(model, entries: list[Entry], documents: list, chunk: int | None, log: Log, identity: str) -> dict:
    """{label: [(kl, top1) per document]}, what the log holds is not measured again."""
    found: dict[str, list[dict]] = {e.label: [] for e in entries}
    for ids, prefix in tqdm(documents, desc="KL", unit="document"):
        keys = {e.label: key_of(identity, digest_of(e.method), ids.tolist(), prefix, chunk) for e in entries}
        todo = {e.label: e.method for e in entries if keys[e.label] not in log.rows}
        for label, track in follow(model, todo, ids, prefix, chunk).items() if todo else ():
            kl, top1 = np.round(track.kl, 6).tolist(), track.top1.astype(int).tolist()
            log.add({"key": keys[label], "kl": kl, "top1": top1, "byte_ratio": track.byte_ratio})
        for label, key in keys.items():
            found[label].append(log.rows[key])
    return found


def divergence(rows: list[dict]) -> dict:
    """Mean KL with its 95 % interval over documents, 99th percentile over tokens, top-1 agreement."""
    kl, means = np.concatenate([r["kl"] for r in rows]), [float(np.mean(r["kl"])) for r in rows]
    low, high = student(means) if len(means) <= 20 else bootstrap(means, 0)
    values = {"kl": float(np.mean(means)), "kl_low": max(0.0, low), "kl_high": high}
    same = np.concatenate([r["top1"] for r in rows])
    values |= {"kl_p99": float(np.quantile(kl, 0.99)), "top1": float(same.mean())}
    values["byte_ratio"] = float(np.mean([r["byte_ratio"] for r in rows]))
    return {k: round(v, 6) for k, v in values.items()}


def beside(rows: list[dict], others: list[dict]) -> dict:
    """Mean difference of KL to another method on the same documents, with its 95 % interval."""
    delta = [float(np.mean(a["kl"]) - np.mean(b["kl"])) for a, b in zip(rows, others, strict=True)]
    low, high = student(delta) if len(delta) <= 20 else bootstrap(delta, 0)
    return {k: round(v, 6) for k, v in {"delta": float(np.mean(delta)), "low": low, "high": high}.items()}


def measure(model, tokenizer, entries: list[Entry], length: int, args, log: Log, bar) -> list[dict]:
    """A row per entry at this length."""
    identity = model_key(model)
    samples, skipped = gather(
        choices(args.tasks), [length], args.cases, args.seed, tokenizer, args.model == "reference"
    )
    assert not skipped, skipped
    book = [(ids, length - SCORED) for ids in held_out(tokenizer, length, args.documents, args.seed)]
    asked = []
    for task in samples:
        for sample in task.samples[:DIVERGED]:
            context, question = encode(sample, tokenizer)
            answer = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
            asked.append((torch.tensor([context + question + answer]), len(context)))
    text = compared(model, entries, book, 32, log, identity)
    retrieval = compared(model, entries, asked, None, log, identity)
    full = Entry(FULL, None, series=FULL)
    answered = [] if args.kl_only else [full, *(e for e in entries if e.series in list(args.series)[: args.answered])]
    scores: dict[str, list] = {e.label: [] for e in answered}
    for task in samples if answered else ():
        runner = Runner(model, tokenizer, answered, args.batch, identity=identity)
        for o in runner.run(Job(task.title, length=length), task.samples, args.answers, bar):
            scores[o.method].append(o)
    rows = []
    for e in [full, *entries]:
        row = {"length": length, "series": e.series, "target": e.target, "reached": e.reached, "setting": e.setting}
        row["label"] = e.label
        row["byte_ratio"] = 1.0
        if e.method is not None:
            row |= {"text": divergence(text[e.label]), "retrieval": divergence(retrieval[e.label])}
            row["byte_ratio"] = row["text"]["byte_ratio"]
            base = e.label.replace(e.series, e.series.partition(",")[0])  # "spectral, uniform @0.2": "spectral @0.2"
            if base != e.label:
                row["beside"] = {"base": base, "text": beside(text[e.label], text[base])}
                row["beside"]["retrieval"] = beside(retrieval[e.label], retrieval[base])
        if e.label in scores:
            hits = [o.score for o in scores[e.label]]
            low, high = bootstrap(hits, 0)
            row |= {"answers": len(hits), "score": round(float(np.mean(hits)), 4), "low": low, "high": high}
            row["byte_ratio_answers"] = round(float(np.mean([o.byte_ratio for o in scores[e.label]])), 5)
            row["by_task"] = {
                t: round(float(np.mean([o.score for o in scores[e.label] if o.task == t])), 3) for t in args.tasks
            }
            row["hits"] = hits
            # a score above the full cache's is luck on a task that the model cannot do; agreement is not
            same = [o.output == f.output for o, f in zip(scores[e.label], scores[FULL], strict=True)]
            row["as_full"] = round(float(np.mean(same)), 4)
        rows.append(row)
    return rows


def verdicts(rows: list[dict], lengths: list[int]) -> list[dict]:
    """At each budget: the main method against the best other one that holds no more bytes than 5 % above it."""
    out = []
    for length in lengths:
        for budget in BUDGETS:
            at = [r for r in rows if r["length"] == length and "hits" in r and r["series"] != FULL]
            ours = next(r for r in at if r["series"] == MAIN and r["target"] == budget)
            others = [r for r in at if r["series"] != MAIN and r["byte_ratio"] <= 1.05 * ours["byte_ratio"]]
            best = max(others, key=lambda r: r["score"])
            delta = [a - b for a, b in zip(ours["hits"], best["hits"], strict=True)]
            low, high = bootstrap(delta, 0)
            out.append({"length": length, "budget": budget, "byte_ratio": ours["byte_ratio"], "score": ours["score"]})
            out[-1] |= {"next": best["label"], "next_byte_ratio": best["byte_ratio"], "next_score": best["score"]}
            out[-1] |= {"delta": round(float(np.mean(delta)), 4), "low": round(low, 4), "high": round(high, 4)}
            out[-1]["best_or_tied"] = high >= 0
            out[-1] |= {"as_full": ours["as_full"], "next_as_full": best["as_full"]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference", help="as the commands' --model")
    parser.add_argument("--out", type=Path, default=Path("docs/results/equal_bytes"))
    parser.add_argument("--work", type=Path, default=Path("equal_bytes"), help="answers and artifacts, to resume from")
    parser.add_argument("--lengths", default="4096", help="with commas between them")
    parser.add_argument("--only", default="", help="series, with commas between them")
    parser.add_argument("--cases", type=int, default=12, help="per task")
    parser.add_argument("--batch", type=int, default=1, help="prompts answered together")
    parser.add_argument("--kl-only", action="store_true", help="no answers: they take most of the time")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000, help="of the paper's training; the paper has 12,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    only = [name for name in re.split(r",(?! )", args.only) if name]  # a name may hold a comma and a space
    lengths = [int(n) for n in args.lengths.split(",")]
    model, tokenizer = load(args.model)
    small = args.model == "reference"
    args.tasks, args.series = TASKS if small else REAL_TASKS, series(args.steps) if small else real_series(args.steps)
    args.answered = ANSWERED[not small]
    args.answers, log = Log(args.work / "outcomes.jsonl"), Log(args.work / "kl.jsonl")
    plans = {length: plan(model, length, args.series, only) for length in lengths}
    flat = [e for length in lengths for e in plans[length]]
    ready = fitted(flat, model, tokenizer, calibration.texts(None), args.work / "artifacts")
    rows, each = [], len(flat) // len(lengths)
    for n, length in enumerate(lengths):
        entries = ready[n * each : (n + 1) * each]
        with tqdm(desc=f"answers {length}", unit="answer") as bar:
            rows += measure(model, tokenizer, entries, length, args, log, bar)
    where = {
        "model": f"{args.model}, bfloat16",
        "cases": args.cases,
        "tasks": args.tasks,
        "documents": args.documents,
        "diverged": DIVERGED,
    }
    chosen = f' --only "{args.only}"' if only else ""
    only_kl = " --kl-only" if args.kl_only else f" --batch {args.batch}" if args.batch > 1 else ""
    where |= {
        "paper_steps": args.steps,
        "seed": args.seed,
        "command": f"python bench/equal_bytes.py --model {args.model} --lengths {args.lengths} --cases {args.cases} "
        f"--documents {args.documents}{chosen}{only_kl}",
    }
    found = {
        **where,
        "verdicts": [] if args.kl_only else verdicts(rows, lengths),
        "rows": [{k: v for k, v in r.items() if k != "hits"} for r in rows],
    }
    files.write_json(args.out / "equal_bytes.json", found)
    if not args.kl_only:
        draw(found, args.out / "equal_bytes.png")
    for v in found["verdicts"]:
        print(v)


if __name__ == "__main__":
    main()
