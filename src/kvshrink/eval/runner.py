"""Run samples through full and shrunken caches, and score what is generated.

Query-agnostic by default: the context is in the cache, compressed, before the question is seen. Every method's prefill
is the model's own, exact attention, so it runs once per sample; each cache is then given the same keys and values
through its own `update`, and question and answer read only what the cache holds.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach import attach, make_cache
from kvshrink.attach.factory import shapes
from kvshrink.attach.hook import Attachment
from kvshrink.cache import KVCache
from kvshrink.errors import EvalError
from kvshrink.eval import entries as entry_list
from kvshrink.eval import prompt, tasks
from kvshrink.eval.entries import Entry
from kvshrink.eval.tasks import Sample
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.store.bytes import nbytes


@dataclass(frozen=True)
class Outcome:
    """One sample through one cache. kept: bytes held at the end over the full cache's bytes."""

    task: str
    method: str
    index: int
    score: float
    output: str
    expected: str
    tokens: int
    nbytes: int
    full: int
    seconds: float

    @property
    def kept(self) -> float:
        return self.nbytes / self.full


class Runner:
    """A model with the methods to compare on it."""

    def __init__(self, model: Any, tokenizer, entries: Sequence[Entry], query_aware: bool = False) -> None:
        entry_list.check(entries)
        self.model, self.tokenizer, self.entries, self.query_aware = model, tokenizer, list(entries), query_aware
        self.attachment = attach(model)
        self.shape = next((s for s in shapes(self.attachment) if s is not None), None)

    def run(
        self, task: str, samples: Sequence[Sample], title: str = "", out: Path | None = None, progress: bool = True
    ) -> list[Outcome]:
        """All entries on all samples of a task, under a title (default: the task's name).

        Outcomes are appended to the JSONL file `out` as they come; what it holds already is not run again.
        """
        title, score = title or task, tasks.get(task).score
        labels = [e.label for e in self.entries]
        done = {(o.method, o.index): o for o in _read(out) if o.task == title}
        results = {(label, i): done[label, i] for i in range(len(samples)) for label in labels if (label, i) in done}
        todo = [i for i in range(len(samples)) if any((label, i) not in done for label in labels)]
        for i in tqdm(todo, desc=title, unit="case", disable=not progress):
            known = {label: done[label, i] for label in labels if (label, i) in done}
            for outcome in self._sample(title, i, samples[i], known, score):
                results[outcome.method, i] = outcome
                if out is not None:
                    _append(out, outcome)
        return [results[label, i] for label in labels for i in range(len(samples))]

    def _sample(
        self, title: str, index: int, sample: Sample, done: dict[str, Outcome], score: Callable[[Sample, str], float]
    ) -> Iterator[Outcome]:
        context, question = prompt.encode(sample, self.tokenizer)
        ids = torch.tensor([context + question], device=next(self.model.parameters()).device)
        # with the question in view only its last token is left to feed; without, the whole question
        dense = self._prefill(ids[:, : ids.shape[1] - 1 if self.query_aware else len(context)])
        held = {label: o.nbytes for label, o in done.items()}
        for entry in self.entries:
            if entry.label in done:
                continue
            started = time.perf_counter()
            cache = self._cache(entry, held, dense)
            text = self._answer(ids, cache, sample.max_new_tokens)
            size, full = _bytes(cache)
            held[entry.label] = size
            yield Outcome(
                task=title,
                method=entry.label,
                index=index,
                score=score(sample, text),
                output=text,
                expected=sample.answers[0],
                tokens=int(cache.get_seq_length()),
                nbytes=size,
                full=full,
                seconds=round(time.perf_counter() - started, 4),
            )

    @torch.inference_mode()
    def _prefill(self, ids: Tensor) -> DynamicCache:
        dense = DynamicCache(config=self.model.config)
        self.model(input_ids=ids, past_key_values=dense, use_cache=True, logits_to_keep=1)
        return dense

    @torch.inference_mode()
    def _answer(self, ids: Tensor, cache: KVCache | DynamicCache, max_new_tokens: int) -> str:
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    @torch.inference_mode()
    def _cache(self, entry: Entry, held: dict[str, int], dense: DynamicCache) -> KVCache | DynamicCache:
        """The entry's cache, filled with the prefilled context."""
        if entry.method is None:
            return copy.deepcopy(dense)
        method = entry.method
        if entry.like is not None and self.shape is not None:
            layers = sum(info.compressed for info in self.attachment.layers)
            method = StreamingLLM.within(held[entry.like] / layers, self.shape)
        cache = make_cache(self.model, method)
        fill(cache, dense, self.attachment)
        return cache


def fill(cache: KVCache, dense: Any, attachment: Attachment) -> None:
    """Give an empty cache the keys and values of an unpadded prefill, layer by layer, as the model would."""
    for i, info in enumerate(attachment.layers):
        keys, values = dense.layers[i].keys, dense.layers[i].values
        if not info.compressed:
            cache.layers[i] = copy.deepcopy(dense.layers[i])
            continue
        b, _, t, _ = keys.shape
        positions = torch.arange(t, dtype=torch.int32, device=keys.device)[None].expand(b, -1)
        cache.stage(i, positions, None, info.rope, True, attachment.fingerprint)
        cache.update(keys, values, i)


def _bytes(cache: Any) -> tuple[int, int]:
    """(bytes held, bytes of the full cache)."""
    if isinstance(cache, KVCache):
        report = cache.report()
        return report.nbytes, report.full
    size = nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))
    return size, size


def _append(out: Path, outcome: Outcome) -> None:
    """Add a line; first end one that an interrupt cut off, so that it does not spoil this one."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        cut = out.is_file() and out.read_bytes()[-1:] not in (b"", b"\n")
        with out.open("a") as f:
            f.write(("\n" if cut else "") + json.dumps(asdict(outcome)) + "\n")
    except OSError as error:
        raise EvalError(f"cannot write {out}: {error.strerror}. Choose another folder.") from error


def _read(out: Path | None) -> list[Outcome]:
    if out is None or not out.is_file():
        return []
    rows = []
    for line in out.read_text().splitlines():
        try:
            rows.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # the last line of an interrupted run may be cut; it is run again
    return rows
