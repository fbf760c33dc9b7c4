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

import numpy as np
import torch
from peer_rows import Beside, tracks
from plot_equal_bytes import draw
from rivals import peers_as_given
from series import ANSWERED, BUDGETS, DIVERGED, MAIN, REAL_TASKS, TASKS, fitting, plan, real_series, seen, series
from tqdm import tqdm

from kvshrink.attach.factory import digest_of
from kvshrink.attach.identity import model_key
from kvshrink.cli._common import load
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import held_out
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.runner import Job
from kvshrink.eval.run.stats import bootstrap, student
from kvshrink.eval.run.teacher import follow
from kvshrink.store import files
from kvshrink.store.log import Log, key_of

SCORED = 128


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


def summary(rows: list[dict]) -> dict:
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
    if getattr(args, "seen", False):  # the question stands in what is compressed
        for task in samples:
            task.samples[:] = [seen(s) for s in task.samples]
    book = [(ids, length - SCORED) for ids in held_out(tokenizer, length, args.documents, args.seed)]
    asked = []
    for task in samples:
        for sample in task.samples[: args.diverged]:
            context, question = encode(sample, tokenizer)
            answer = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
            asked.append((torch.tensor([context + question + answer]), len(context)))
    peers = peers_as_given(model) if args.peers else []
    text, retrieval = (
        compared(model, entries, given, chunk, log, identity) | tracks(model, peers, given, chunk, log, identity)
        for given, chunk in ((book, 32), (asked, None))
    )
    full = Entry(FULL, None, series=FULL)
    strangers = [Entry(p.label, None, series=p.label) for p in peers]
    asked_too = [e for e in [*entries, *strangers] if not {e.series, e.label}.isdisjoint(args.answered)]
    answered = [] if args.kl_only else [full, *asked_too]
    scores: dict[str, list] = {e.label: [] for e in answered}
    for task in samples if answered else ():
        runner = Beside(model, tokenizer, answered, args.batch, identity=identity)
        runner.peers = {p.label: p for p in peers}
        for o in runner.run(Job(task.title, length=length), task.samples, args.answers, bar):
            scores[o.method].append(o)
    rows = []
    for e in [full, *entries, *strangers]:
        row = {"length": length, "series": e.series, "target": e.target, "reached": e.reached, "setting": e.setting}
        row["label"] = e.label
        row["byte_ratio"] = 1.0
        if e.label in text:
            row |= {"text": summary(text[e.label]), "retrieval": summary(retrieval[e.label])}
            row["byte_ratio"] = row["text"]["byte_ratio"]
            base = e.label.replace(e.series, e.series.partition(",")[0])  # "spectral, uniform @0.2": "spectral @0.2"
            if base != e.label and base in text:
                row["beside"] = {"base": base, "text": beside(text[e.label], text[base])}
                row["beside"]["retrieval"] = beside(retrieval[e.label], retrieval[base])
        if e.label in scores:
            hits = [o.score for o in scores[e.label]]
            low, high = bootstrap(hits, 0)
            row |= {"answers": len(hits), "score": round(float(np.mean(hits)), 4), "low": low, "high": high}
            if e not in strangers:  # what a runner counts is ours
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
            ours = next((r for r in at if r["series"] == MAIN and r["target"] == budget), None)
            if ours is None:  # not asked
                continue
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


def _names(text: str) -> list[str]:
    """Labels with commas between them, which may hold a comma and a space themselves."""
    return [name for name in re.split(r",(?! )", text) if name]


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
    parser.add_argument("--answered", default="", help="series or rows whose answers are compared; else the first ones")
    parser.add_argument("--quantisers", action="store_true", help="every quantiser at the bits that fit, too")
    parser.add_argument("--peers", action="store_true", help="QuantizedCache too: see bench/peers/make.sh")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--diverged", type=int, default=DIVERGED, help="samples of each task whose KL is measured")
    parser.add_argument("--threads", type=int, help="as many as there are cores by default")
    parser.add_argument("--steps", type=int, default=2000, help="of the paper's training; the paper has 12,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    only = _names(args.only)
    lengths = [int(n) for n in args.lengths.split(",")]
    model, tokenizer = load(args.model)
    small = args.model == "reference"
    args.tasks, args.series = TASKS if small else REAL_TASKS, series(args.steps) if small else real_series(args.steps)
    args.answered = _names(args.answered) or list(args.series)[: ANSWERED[not small]]
    args.answers, log = Log(args.work / "outcomes.jsonl"), Log(args.work / "kl.jsonl")
    plans = {length: plan(model, length, args.series, only) for length in lengths}
    for length in lengths if args.quantisers else ():
        known = {e.method for e in plans[length]}
        plans[length] += [e for e in fitting(model, length) if e.method not in known]
    flat = [e for length in lengths for e in plans[length]]
    ready = fitted(flat, model, tokenizer, calibration.texts(None), args.work / "artifacts")
    rows, done = [], 0
    for length in lengths:
        entries = ready[done : done + len(plans[length])]
        done += len(entries)
        with tqdm(desc=f"answers {length}", unit="answer") as bar:
            rows += measure(model, tokenizer, entries, length, args, log, bar)
    where = {
        "model": f"{args.model}, bfloat16",
        "cases": args.cases,
        "tasks": args.tasks,
        "documents": args.documents,
        "diverged": args.diverged,
    }
    chosen = f' --only "{args.only}"' if only else ""
    flags = "" if args.kl_only else f' --answered "{",".join(args.answered)}"'
    flags += "".join(f" --{x.replace('_', '-')}" for x in ("kl_only", "quantisers", "peers") if vars(args)[x])
    flags += f" --batch {args.batch}" if args.batch > 1 and not args.kl_only else ""
    where |= {
        "paper_steps": args.steps,
        "seed": args.seed,
        "command": f"python bench/equal_bytes.py --model {args.model} --lengths {args.lengths} --cases {args.cases} "
        f"--documents {args.documents} --diverged {args.diverged}{chosen}{flags}",
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
