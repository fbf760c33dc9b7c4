"""Accuracy at equal memory: every quantiser beside transformers' QuantizedCache, on retrieval and on held-out text.

    bench/peers/make.sh quanto hqq
    bench/peers/quanto-hqq/venv/bin/python bench/quantisers.py     # writes docs/results/quantisers.json, .md and .png
    ... bench/quantisers.py --model smollm2 --length 2048 --kl-only --out docs/results/smollm2

Contexts of --length tokens, which every contender is given after the same exact prefill.
A prompt is read by all in turn before the next one. Bits are of a stored number, scales and indices included, from the
tensors that are alive: ours in the body, the peers' in the quantised part; `byte_ratio` counts all (window, sinks,
positions) over the full cache, after the prompt and 127 tokens later. The last tokens of a context, beyond a
multiple of 64, are read with the question. Answers are greedy; KL is over question and answer, and over the last 128
tokens of book text, 32 a forward. Run again to go on where it stopped.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plot_quantisers import draw, table
from rivals import Contender, answer, divergence, full_contender, ours, peers, plain, plan
from series import REAL_TASKS, TASKS
from tqdm import tqdm

from kvshrink.attach.fill import prefill, wanted_by
from kvshrink.attach.identity import model_key
from kvshrink.cli._common import load
from kvshrink.eval import metrics
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import held_out
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.stats import bootstrap
from kvshrink.store import files
from kvshrink.store.log import Log, key_of

SCORED, CHUNK = 128, 32
LATER = 127  # tokens after the prompt when bytes are measured again: the peers' residual is as long as it gets
MULTIPLE = 64  # contexts are cut to it, the rest is read exactly with the question: quanto's axis -1 refuses others


def measure(model: Any, tokenizer: Any, contenders: list[Contender], log: Log, args: argparse.Namespace) -> set[str]:
    """Answers and divergences of all contenders into the log, a prompt at a time, in turn. Gives their keys."""
    identity, small = model_key(model), args.model == "reference"
    samples, skipped = gather(choices(args.tasks), [args.length], args.cases, 0, tokenizer, small)
    assert not skipped, skipped
    books = held_out(tokenizer, args.length, args.documents, 0)
    prompts = [("book", n, ids[0].tolist(), None) for n, ids in enumerate(books)]
    for task in samples:
        for n, sample in enumerate(task.samples):
            context, question = encode(sample, tokenizer)
            prompts.append((task.title, n, context + question, sample))
    wanted: set[str] = set()
    for title, n, ids, sample in tqdm(prompts, desc="prompts"):
        keys = {contender.label: key_of(identity, contender.identity, title, ids) for contender in contenders}
        wanted |= set(keys.values())
        todo = [contender for contender in contenders if keys[contender.label] not in log.rows]
        if not todo:
            continue
        context = len(ids) - SCORED if sample is None else len(encode(sample, tokenizer)[0])
        context = context // MULTIPLE * MULTIPLE
        dense = prefill(model, torch.tensor([ids[:context]]), wanted=wanted_by(c.method for c in contenders))
        for contender in todo:
            cache = contender.fill(dense)
            bits, held = contender.held(cache)
            row = {"key": keys[contender.label], "contender": contender.label, "task": title, "case": n, "bits": bits}
            row["byte_ratio"] = held / plain(dense)
            if sample is None:
                scored, chunk = ids, CHUNK
            else:
                if not args.kl_only:
                    row["output"] = answer(model, tokenizer, ids, contender.fill(dense), sample.max_new_tokens)
                    row["score"] = metrics.score(sample, row["output"])
                scored = ids + tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
                chunk = len(scored)
            kl = divergence(model, scored, context + 1, cache, copy.deepcopy(dense), chunk)[2]
            row["kl"] = np.round(kl, 6).tolist()
            log.add(row)
    return wanted


@torch.inference_mode()
def later(model: Any, tokenizer: Any, contenders: list[Contender], log: Log, length: int) -> dict[str, float]:
    """Share of bytes that each holds when some tokens more were read: the peers' residuals have grown by then."""
    ids = held_out(tokenizer, length, 1, 0)[0]
    context = (length - LATER) // MULTIPLE * MULTIPLE
    keys = {contender.label: key_of("later", contender.identity, LATER, length) for contender in contenders}
    todo = [contender for contender in contenders if keys[contender.label] not in log.rows]
    if todo:
        dense = prefill(model, ids[:, :context], wanted=wanted_by(c.method for c in contenders))
        for contender in tqdm(todo, desc="bytes"):
            cache = contender.fill(dense)
            model(input_ids=ids[:, context : context + LATER], past_key_values=cache)
            full = plain(dense) * (context + LATER) // context
            log.add(
                {"key": keys[contender.label], "contender": contender.label, "later": contender.held(cache)[1] / full}
            )
    return {contender.label: log.rows[keys[contender.label]]["later"] for contender in contenders}


def summary(contenders: list[Contender], log: Log, keys: set[str]) -> list[dict]:
    by_contender: dict[str, list[dict]] = {}
    for key in sorted(keys):  # a log may hold what other fits gave
        by_contender.setdefault(log.rows[key]["contender"], []).append(log.rows[key])
    out = []
    for contender in contenders:
        rows = by_contender[contender.label]
        text, asked = ([r for r in rows if (r["task"] == "book") == book] for book in (True, False))
        hits = [r["score"] for r in sorted(asked, key=lambda r: (r["task"], r["case"])) if "score" in r]
        found = {"label": contender.label, "group": contender.group, "answers": len(hits)}
        numbers = {
            "bits": float(np.mean([r["bits"] for r in rows])),
            "byte_ratio": float(np.mean([r["byte_ratio"] for r in rows])),
            "kl_text": float(np.mean([np.mean(r["kl"]) for r in text])),
            "kl_retrieval": float(np.mean([np.mean(r["kl"]) for r in asked])),
        }
        if hits:
            low, high = bootstrap(hits, 0)
            numbers |= {"score": float(np.mean(hits)), "low": low, "high": high}
        out.append(found | {k: round(v, 5) for k, v in numbers.items()})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference", help="as the commands' --model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kl-only", action="store_true", help="no answers")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("quantisers"), help="answers and artifacts, to resume from")
    parser.add_argument("--cases", type=int, default=12, help="per task")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)
    args.tasks = TASKS if args.model == "reference" else REAL_TASKS
    log = Log(args.work / "outcomes.jsonl")
    ready = fitted(plan(), model, tokenizer, calibration.texts(None), args.work / "artifacts")
    contenders = [full_contender(), *peers(model), *(ours(model, e.label, e.series, e.method) for e in ready)]
    keys = measure(model, tokenizer, contenders, log, args)
    grown, rows = later(model, tokenizer, contenders, log, args.length), summary(contenders, log, keys)
    for row in rows:
        row["byte_ratio_later"] = round(grown[row["label"]], 5)
    found = {
        "command": f"python bench/quantisers.py --model {args.model} --length {args.length} --cases {args.cases}"
        f" --documents {args.documents}{' --kl-only' * args.kl_only}",
        "model": f"{args.model}, bfloat16",
        "tokens": args.length,
        "cases": args.cases,
        "documents": args.documents,
        "tasks": args.tasks,
        "rows": rows,
    }
    files.write_json(args.out / "quantisers.json", found)
    (args.out / "quantisers.md").write_text(table(rows))
    if not args.kl_only:
        draw(rows, args.out / "quantisers.png")


if __name__ == "__main__":
    main()
