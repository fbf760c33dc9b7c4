"""The table of the model card: exact match by task and length, and the loss on held-out books.

One question per document, documents fitted to 93-100 % of the length where the task allows it, keys and filler that
training never saw. Rows are written as they are measured, so an interrupted evaluation goes on where it stopped.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.reference_model import tasks
from recipes.reference_model.batches import Encoder
from recipes.reference_model.checkpoint import write_atomically
from recipes.reference_model.corpus import Corpus
from recipes.reference_model.measure import answers_right, book_loss
from recipes.reference_model.tasks.world import Example, World

BOOK_TOKENS = 32768
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOSS = "book, loss per token"
PERPLEXITY = "book, perplexity per token"


class Row(NamedTuple):
    cases: int
    make: Callable[[int, int], Example]  # (size in tokens, number of the case)


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    path: Path,
    *,
    lengths: list[int],
    cases: int,
    trained: int,
) -> dict:
    """Fill the report at `path`; a report on weights after another number of trained tokens is begun anew."""
    report = {"trained_tokens": trained, "cases": cases, "rows": {}}
    if path.exists():
        before = json.loads(path.read_text())
        report = before if {**before, "rows": {}} == report else report
    encoder, texts = Encoder(tokenizer), list(corpus.held_out.values())
    for length in lengths:
        for name, row in tqdm(rows(corpus, length, cases).items(), desc=f"evaluate {length}"):
            if not _has(report, name, length):
                _put(report, name, length, measure_row(model, encoder, row, length))
                _write(report, path)
        if not _has(report, PERPLEXITY, length):
            loss = book_loss(model, tokenizer, texts, length, windows=max(4, BOOK_TOKENS // length))
            _put(report, LOSS, length, round(loss, 4))
            _put(report, PERPLEXITY, length, round(math.exp(loss), 2))
            _write(report, path)
    return report


def rows(corpus: Corpus, length: int, cases: int) -> dict[str, Row]:
    new = corpus.held_out_world(random.Random(length))
    known = World(corpus.words, new.books, random.Random(length), new.chars_per_token)
    few = min(cases, max(4, cases // 5))

    def line(world: World, hard: bool = False) -> Row:
        return Row(cases, lambda s, i: tasks.lines(world, s, questions=1, ask_at=(i + 0.5) / cases, hard=hard))

    def needle(count: int, keys: int, depth: Callable[[int], float]) -> Row:
        return Row(count, lambda s, i: tasks.needles(new, s, keys=keys, depth=depth(i), questions=1))

    def chain(hops: int) -> Row:
        return Row(few, lambda s, i: tasks.variables(new, s, chains=4, hops=hops, noise=True))

    return {
        "lines": line(new),
        "lines, keys that share words": line(new, hard=True),
        "lines, training words": line(known),
        **{f"passkey at {d}": Row(few, lambda s, i, d=d: tasks.passkey(new, s, d)) for d in DEPTHS},
        **{f"needle at {d}": needle(few, 1, lambda i, d=d: d) for d in DEPTHS},
        "needle among 4 keys": needle(cases, 4, lambda i: (i + 0.5) / cases),
        "needle among needles": Row(cases, lambda s, i: tasks.haystack(new, s, questions=1)),
        "multi-value (4)": Row(max(1, cases // 2), lambda s, i: tasks.multivalue(new, s, keys=1, values=4)),
        "json lookup": Row(cases, lambda s, i: tasks.jsonkv(new, s, questions=1)),
        **{f"variables, {hops} hops": chain(hops) for hops in (1, 2, 4)},
    }


def measure_row(model: LlamaForCausalLM, encoder: Encoder, row: Row, length: int) -> dict:
    documents = [_fitted(encoder, lambda size, i=i: row.make(size, i), length) for i in range(row.cases)]
    sizes = [len(encoder(ex, close=False)[0]) for ex in documents]
    right = [r for ex in documents for r in answers_right(model, encoder, ex)]
    return {"exact": round(sum(right) / len(right), 4), "answers": len(right), "tokens": [min(sizes), max(sizes)]}


def _fitted(encoder: Encoder, make: Callable[[int], Example], length: int) -> Example:
    """Generators miss their size by a few per cent: ask again for a size corrected by the miss."""
    size = length
    for _ in range(12):
        ex = make(size)
        tokens = len(encoder(ex, close=False)[0])
        if 0.93 * length <= tokens <= length:
            break
        size = int(size * 0.965 * length / tokens)
    return ex


def _has(report: dict, name: str, length: int) -> bool:
    return str(length) in report["rows"].get(name, {})


def _put(report: dict, name: str, length: int, value: dict | float) -> None:
    report["rows"].setdefault(name, {})[str(length)] = value


def _write(report: dict, path: Path) -> None:
    write_atomically(path, lambda part: part.write_text(json.dumps(report, indent=1) + "\n"))
