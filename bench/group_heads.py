"""What it costs that heads do not share a key basis: CSKV with one head per basis beside all in one, at equal bytes.

    python bench/group_heads.py --out docs/results/group_heads.json

The bundled reference model has 2 KV heads of 64 channels. Ranks are chosen to divide by them, so that both contenders
hold the same bytes and differ in the key basis alone. KL and perplexity over the last 128 tokens of held-out text, 32 a
forward; KL over question and answer of retrieval prompts, and the answers (context compressed before the question);
errors of each layer by itself. Differences are paired, on the same documents and questions. float32, 4,096 tokens. Run
again to resume. A made layer of 8 heads stands beside it (synthetic_heads.py).
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import synthetic_heads as synthetic
import torch
from equal_bytes import SCORED
from series import DIVERGED, TASKS
from tqdm import tqdm

from kvshrink import CSKV, reference_model
from kvshrink.attach.factory import digest_of
from kvshrink.attach.identity import model_key
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import Samples, choices, gather
from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.eval.run.fidelity import summary
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.layers import layer_errors
from kvshrink.eval.run.measure import held_out, plain, track_of
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.eval.run.stats import bootstrap, paired, student
from kvshrink.eval.run.teacher import Track, follow
from kvshrink.store import files
from kvshrink.store.log import Log, key_of

KEEPS = (26 / 128, 0.5)  # .2 in ranks that divide by the heads
BITS = (None, 4)
SIZES = (1, None)
LENGTH = 4096
CHUNK = 32
BY_LAYER = 4  # documents


def label(keep: float, bits: int | None, size: int | None) -> str:
    return f"keep {keep:g}, {bits or 32} bit, group_heads {size}"


def tracks(model, entries: list[Entry], documents: list, chunk: int | None, log: Log, identity: str) -> dict:
    """{label: a Track per document}; what the log holds is not measured again."""
    found: dict[str, list[Track]] = {e.label: [] for e in entries}
    for ids, prefix in tqdm(documents, desc="KL", unit="document"):
        keys = {e.label: key_of(identity, digest_of(e.method), ids.tolist(), prefix, chunk) for e in entries}
        todo = {e.label: e.method for e in entries if keys[e.label] not in log.rows}
        for name, track in follow(model, todo, ids, prefix, chunk).items() if todo else ():
            log.add({"key": keys[name], "track": plain(track)})
        for name, key in keys.items():
            found[name].append(track_of(log.rows[key]["track"]))
    return found


def prompts(samples: list[Samples], tokenizer) -> list:
    """(tokens of context, question and answer; where the question begins) of the first samples of each task."""
    out = []
    for sample in (s for task in samples for s in task.samples[:DIVERGED]):
        context, question = encode(sample, tokenizer)
        answer = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
        out.append((torch.tensor([context + question + answer]), len(context)))
    return out


def predictions(of: list[Track], by: str) -> dict:
    """KL and top-1 agreement, of documents perplexity too."""
    if by == "retrieval":  # of unequal lengths
        means = [float(t.kl.mean()) for t in of]
        low, high = interval(means)
        found = {"kl_mean": float(np.mean(means)), "kl_low": max(0.0, low), "kl_high": high}
        return {k: round(v, 6) for k, v in found.items()}
    every = summary(of, [], "decode", CHUNK).to_dict()
    return {k: every[k] for k in ("kl_mean", "kl_low", "kl_high", "kl_p99", "top1", "ppl", "ppl_full", "byte_ratio")}


def interval(values: list[float]) -> tuple[float, float]:
    return student(values) if len(values) <= 20 else bootstrap(values, 0)


def beside(of: list[Track], joint: list[Track]) -> dict:
    """One head per basis against all in one: KL over KL and perplexity over perplexity, with 95 % intervals."""
    ratios = [math.log(float(a.kl.mean()) / float(b.kl.mean())) for a, b in zip(of, joint, strict=True)]
    nll = [float(a.nll.mean() - b.nll.mean()) for a, b in zip(of, joint, strict=True)]
    out = {}
    for name, values in (("kl_ratio", ratios), ("ppl_ratio", nll)):
        low, high = interval(values)
        out |= {name: math.exp(np.mean(values)), f"{name}_low": math.exp(low), f"{name}_high": math.exp(high)}
    return {k: round(float(v), 5) for k, v in out.items()}


def errors(model, entries: list[Entry], documents: list, log: Log, identity: str) -> dict[str, list[dict]]:
    """{label: a row per layer}, mean over some documents."""
    found = {}
    for e in tqdm(entries, desc="layers", unit="method"):
        per: list[list[dict]] = []
        for ids, prefix in documents[:BY_LAYER]:
            key = key_of(identity, "layers", digest_of(e.method), ids.tolist(), prefix)
            if key not in log.rows:
                log.add({"key": key, "rows": [x.to_dict() for x in layer_errors(model, e.method, ids, prefix, CHUNK)]})
            per.append(log.rows[key]["rows"])
        names = ("key_error", "value_error", "output_error")
        found[e.label] = [
            {"layer": at[0]["layer"], **{n: round(float(np.mean([r[n] for r in at])), 5) for n in names}}
            for at in zip(*per, strict=True)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/group_heads.json"))
    parser.add_argument("--work", type=Path, default=Path("group_heads"), help="answers and artifacts, to resume from")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--cases", type=int, default=24, help="per task")
    args = parser.parse_args()
    made = synthetic.rows(BITS, KEEPS)
    model, tokenizer = reference_model("float32")
    settings = [(k, b, s) for k in KEEPS for b in BITS for s in SIZES]
    entries = [Entry(label(*x), CSKV(keep=x[0], bits=x[1], group_heads=x[2])) for x in settings]
    entries = fitted(entries, model, tokenizer, calibration.texts(None), args.work / "artifacts")
    samples, skipped = gather(choices(TASKS), [LENGTH], args.cases, 0, tokenizer, True)
    assert not skipped, skipped
    book = [(ids, LENGTH - SCORED) for ids in held_out(tokenizer, LENGTH, args.documents, 0)]
    identity, log, answers = model_key(model), Log(args.work / "tracks.jsonl"), Log(args.work / "outcomes.jsonl")
    layers = errors(model, entries, book, log, identity)
    asked = prompts(samples, tokenizer)
    read = {
        "text": tracks(model, entries, book, CHUNK, log, identity),
        "retrieval": tracks(model, entries, asked, None, log, identity),
    }
    hits: dict[str, list[float]] = {}
    with tqdm(desc="answers", unit="answer") as bar:
        for task in samples:
            runner = Runner(model, tokenizer, [Entry(FULL, None), *entries], identity=identity)
            for o in runner.run(Job(task.title, length=LENGTH), task.samples, answers, bar):
                hits.setdefault(o.method, []).append(o.score)
    rows: list[dict[str, Any]] = [{"label": FULL, "answers": len(hits[FULL]), "score": round(np.mean(hits[FULL]), 4)}]
    for (keep, bits, size), e in zip(settings, entries, strict=True):
        ranks = {"key_rank_a_basis": e.method.layers[0]["key_up"].shape[1]}
        ranks["value_rank"] = e.method.layers[0]["value_up"].shape[1]
        held = read["text"][e.label][0].held
        row = {"label": e.label, "keep": keep, "bits": bits, "group_heads": size, **ranks, "held_bytes": held}
        row |= {"answers": len(hits[e.label]), "score": round(np.mean(hits[e.label]), 4)}
        row |= {by: predictions(found[e.label], by) for by, found in read.items()} | {"layers": layers[e.label]}
        if size is not None:
            other = label(keep, bits, None)
            theirs = read["text"][other][0].held
            assert abs(held / theirs - 1) < 0.01, (held, theirs)
            against = {by: beside(found[e.label], found[other]) for by, found in read.items()}
            won = paired(hits[e.label], hits[other])
            against["answers"] = {"only_this": won.only_a, "only_joint": won.only_b, "p": float(f"{won.p:.2g}")}
            row["beside_joint"] = {"held_ratio": held / theirs, **against}
        rows.append(row)
    where = {"model": "reference, float32, 2 KV heads of 64", "tokens": LENGTH, "documents": len(book)}
    where |= {"prompts": len(asked), "tasks": TASKS, "cases": args.cases}
    found = {"command": "python bench/group_heads.py", **where, "rows": rows}
    found["synthetic"] = {"shape": f"{synthetic.HEADS} KV heads of {synthetic.DIM}", "how": synthetic.HOW, "rows": made}
    files.write_json(args.out, found)


if __name__ == "__main__":
    main()
