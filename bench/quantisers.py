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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from equal_bytes import REAL_TASKS, TASKS
from plot_quantisers import draw, table
from tqdm import tqdm
from transformers import DynamicCache, cache_utils

from kvshrink import make_cache, methods
from kvshrink.attach import attach
from kvshrink.attach.factory import digest_of
from kvshrink.attach.fill import fill, prefill
from kvshrink.attach.identity import model_key
from kvshrink.cli._common import load
from kvshrink.eval import metrics
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import held_out
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.stats import bootstrap
from kvshrink.eval.run.teacher import compared
from kvshrink.methods._quantiser import Quantiser
from kvshrink.store import files
from kvshrink.store.bytes import nbytes
from kvshrink.store.log import Log, key_of

SCORED, CHUNK = 128, 32
LATER = 127  # tokens after the prompt when bytes are measured again: the peers' residual is as long as it gets
MULTIPLE = 64  # contexts are cut to it, the rest is read exactly with the question: quanto's axis -1 refuses others
FULL = "full"
WINDOW = {"window": 32, "sinks": 4}  # of every quantiser, beside the paper's own where that differs
# settings that stand for about 1.5 bits, where a method has no `bits`
OTHERS = {"kivi": [{"group": 64}, {"group": 128}, {"bits": 4, "group": 64}]}


@dataclass
class Contender:
    """A way to hold the cache. fill: a cache from an exact prefill; bits: of a stored number, of such a cache."""

    label: str
    group: str
    identity: str
    fill: Callable[[DynamicCache], Any]
    held: Callable[[Any], tuple[float, int]]


def ours(model: Any, label: str, group: str, method: Any) -> Contender:
    attachment = attach(model)

    def filled(dense: DynamicCache) -> Any:
        cache = make_cache(model, method)
        fill(cache, dense, attachment)
        return cache

    def held(cache: Any) -> tuple[float, int]:
        return cache.report().bits or 0.0, cache.nbytes

    return Contender(label, group, digest_of(method), filled, held)


def peer(model: Any, backend: str, bits: int, axis: int, size: int) -> Contender:
    """transformers' own, with its default residual of 128 tokens, which a prefill leaves empty."""
    kind = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}[backend]
    label = f"QuantizedCache {backend} int{bits} axis {axis} group {size}"

    def filled(dense: DynamicCache) -> Any:
        cache = DynamicCache(config=model.config)
        make = getattr(cache_utils, kind)
        cache.layers = [make(bits, axis, axis, size) for _ in dense.layers]
        for i, layer in enumerate(dense.layers):
            cache.update(layer.keys, layer.values, i)
        return cache

    def held(cache: Any) -> tuple[float, int]:
        quantised, rest, numbers = 0, 0, 0
        for layer in cache.layers:
            parts = (layer._quantized_keys, layer._quantized_values)
            if backend == "quanto":
                tensors = [t for q in parts for t in (q._data._data, q._scale, q._shift)]
                numbers += sum(q.numel() for q in parts)
            else:
                tensors = [t for codes, meta in parts for t in (codes, meta["scale"], meta["zero"])]
                numbers += sum(int(np.prod(meta["shape"])) for _, meta in parts)
            quantised += nbytes(tensors)
            rest += nbytes([layer.keys, layer.values])
        return 8 * quantised / numbers, quantised + rest

    return Contender(label, "peer", label, filled, held)


def full_contender() -> Contender:
    return Contender(FULL, FULL, FULL, copy.deepcopy, lambda cache: (16.0, _plain(cache)))


def _plain(cache: Any) -> int:
    return nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))


def plan() -> list[Entry]:
    """Every quantiser at every number of bits that it offers between 1 and 4 (and those that have none)."""
    out = []
    for name in methods.names():
        cls = methods.get(name)
        if not issubclass(cls, Quantiser):
            continue
        variants: list[dict] = []
        for bits in (4, 3, 2, 1.5, 1):
            try:
                cls(bits=bits)
                variants.append({"bits": bits})
            except (methods.SettingError, TypeError):
                continue
        for given in [*(variants or [{}]), *OTHERS.get(name, [])]:
            shown = ",".join(f"{k}={v}" for k, v in given.items())
            label = f"{name}:{shown}" if shown else name
            own = cls(**given)
            out.append(Entry(label, own, series="paper's window"))
            near = methods.build(name, given | WINDOW)
            if near != own:
                out.append(Entry(f"{label} w32", near, series="window 32"))
    return out


def peers(model: Any) -> list[Contender]:
    found = [("quanto", b, a, g) for b in (4, 2) for a in (0, -1) for g in (64, 32)]
    # hqq packs 3 bits along axis 1 so that it cannot read them again
    found += [("hqq", b, a, g) for b in (4, 3, 2, 1) for a in (0, 1) for g in (64, 32) if (b, a) != (3, 1)]
    return [peer(model, *settings) for settings in found]


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, ids: list[int], cache: Any, limit: int) -> str:
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), past_key_values=cache, max_new_tokens=limit, do_sample=False
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@torch.inference_mode()
def divergence(model: Any, ids: list[int], first: int, cache: Any, dense: DynamicCache, chunk: int) -> list[float]:
    """KL of the predictions of ids[first:], a chunk a forward, from those over the full cache."""
    found: list[float] = []
    for at in range(first - 1, len(ids) - 1, chunk):
        end = min(at + chunk, len(ids) - 1)
        part, targets = torch.tensor([ids[at:end]]), torch.tensor(ids[at + 1 : end + 1])
        full, mine = (model(input_ids=part, past_key_values=c).logits[0] for c in (dense, cache))
        found += compared(full, mine, targets)[2].tolist()
    return found


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
        dense = prefill(model, torch.tensor([ids[:context]]), asked=True)
        for contender in todo:
            cache = contender.fill(dense)
            bits, held = contender.held(cache)
            row = {"key": keys[contender.label], "contender": contender.label, "task": title, "case": n, "bits": bits}
            row["byte_ratio"] = held / _plain(dense)
            if sample is None:
                scored, chunk = ids, CHUNK
            else:
                if not args.kl_only:
                    row["output"] = answer(model, tokenizer, ids, contender.fill(dense), sample.max_new_tokens)
                    row["score"] = metrics.score(sample, row["output"])
                scored = ids + tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
                chunk = len(scored)
            row["kl"] = np.round(divergence(model, scored, context + 1, cache, copy.deepcopy(dense), chunk), 6).tolist()
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
        dense = prefill(model, ids[:, :context], asked=True)
        for contender in tqdm(todo, desc="bytes"):
            cache = contender.fill(dense)
            model(input_ids=ids[:, context : context + LATER], past_key_values=cache)
            full = _plain(dense) * (context + LATER) // context
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
