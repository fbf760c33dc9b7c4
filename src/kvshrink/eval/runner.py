"""Run samples through full and shrunken caches, and score what is generated.

Modes:
    agnostic    the context is in the cache, compressed, before the question is seen (the default); several questions
                about one context read one compressed cache
    aware       the question is in view while the context is compressed
    multi_turn  the questions about one context are asked one after the other on one growing cache, each after the
                reference answers of those before it (SCBench, arXiv 2412.10319)

Every method's prefill is exact, so it runs once per context (`prefill`); question and answer read only what a cache
holds. Where asked, a method that fails is recorded and left out of that task, while the others go on.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach import attach, make_cache
from kvshrink.attach.factory import digest_of, shapes
from kvshrink.cache import KVCache
from kvshrink.eval import entries as entry_list
from kvshrink.eval import metrics
from kvshrink.eval.entries import ZEROS, Entry
from kvshrink.eval.outcomes import Failure, Log, Outcome, key_of
from kvshrink.eval.prefill import fill, prefill
from kvshrink.eval.rounds import AGNOSTIC, Group, groups, left_pad
from kvshrink.eval.tasks import Sample
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.store.bytes import nbytes
from kvshrink.store.tokens import BYTES_PER_TOKEN


@dataclass(frozen=True)
class Job:
    """A task in one mode, at one length: what its outcomes have in common."""

    title: str
    mode: str = AGNOSTIC
    length: int = 0


class Runner:
    """A model with the methods to compare on it.

    batch:   contexts that go through the model together, left-padded. Pads change which tokens share a page.
    isolate: record a method's failure in `failures` and go on, instead of raising.
    """

    def __init__(self, model: Any, tokenizer, entries: Sequence[Entry], batch: int = 1, isolate: bool = False) -> None:
        entry_list.check(entries)
        self.model, self.tokenizer, self.entries = model, tokenizer, list(entries)
        self.batch, self.isolate = batch, isolate
        self.attachment = attach(model)
        self.shape = next((s for s in shapes(self.attachment) if s is not None), None)
        self.failures: list[Failure] = []

    def run(
        self, job: Job, samples: Sequence[Sample], log: Log | None = None, bar: tqdm | None = None
    ) -> list[Outcome]:
        """All entries on all samples, entry by entry; what the log holds is not run again. The bar counts answers."""
        log = log or Log(None)
        asked = list(groups(samples, job.mode, self.tokenizer, self.batch))
        own = bar if bar is not None else tqdm(total=len(samples) * len(self.entries), desc=job.title, unit="answer")
        failed: dict[str, str] = {}
        for group in asked:
            known = sum(log.outcome(self.key(job, e, s)) is not None for e in self.entries for _, s in group.cases)
            own.update(known)
            if known < len(self.entries) * len(group.cases):
                for outcome in self._group(job, group, log, failed):
                    log.add_outcome(outcome)
                    own.update()
        if bar is None:
            own.close()
        self.failures += [Failure(label, job.title, job.length, error) for label, error in failed.items()]
        found = ((e, log.outcome(self.key(job, e, s))) for e in self.entries for s in samples)
        # two budgets may have come to the same setting: one run answers for both
        return [replace(outcome, method=entry.label) for entry, outcome in found if outcome is not None]

    def key(self, job: Job, entry: Entry, sample: Sample) -> str:
        """A hash of all that an outcome depends on: a resumed run takes no other's."""
        method = entry.label if entry.method is None else digest_of(entry.method)
        place = (job.title, job.mode, job.length, sample.meta.get("index"), sample.meta.get("turn"), self.batch)
        text = (sample.context, sample.question, sample.answer_prefix, sample.answers, sample.metric)
        model = (self.attachment.fingerprint, str(self.model.dtype))
        return key_of(model, method, entry.like, place, text, sample.max_new_tokens)

    def _group(self, job: Job, group: Group, log: Log, failed: dict[str, str]) -> Iterator[Outcome]:
        ids, mask = left_pad(group.contexts, self._pad, next(self.model.parameters()).device)
        dense = prefill(self.model, ids, None if bool(mask.all()) else mask)
        held: dict[str, int] = {}  # bytes of a row
        for entry in self.entries:
            keys = {i: self.key(job, entry, sample) for i, sample in group.cases}
            rows = [o for key in keys.values() if (o := log.outcome(key)) is not None]
            if len(rows) < len(keys) and entry.label not in failed:
                try:
                    for outcome in self._entry(job, group, entry, keys, log, (dense, ids, mask), held):
                        rows.append(outcome)
                        yield outcome
                except Exception as error:
                    if not self.isolate:
                        raise
                    failed[entry.label] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if rows:
                held[entry.label] = rows[-1].nbytes - BYTES_PER_TOKEN * rows[-1].tokens

    def _entry(
        self,
        job: Job,
        group: Group,
        entry: Entry,
        keys: dict[int, str],
        log: Log,
        filled: tuple[DynamicCache, Tensor, Tensor],
        held: dict[str, int],
    ) -> Iterator[Outcome]:
        """One entry's answers to the rounds of a group that are not known yet."""
        dense, ids, mask = filled
        started = time.perf_counter()
        cache = self._cache(entry, held, dense, mask)
        encode = time.perf_counter() - started
        todo = [any(log.outcome(keys[i]) is None for i, _ in cases) for cases in group.rounds]
        last = max(n for n, wanted in enumerate(todo) if wanted)
        for n, (cases, questions) in enumerate(zip(group.rounds, group.questions, strict=True)):
            if n > last:
                return
            if todo[n]:
                fork = cache if n == last else copy.deepcopy(cache)
                texts, seconds = self._answer(ids, mask, questions, fork, max(s.max_new_tokens for _, s in cases))
                size, full = _bytes(fork)
                for (i, sample), text in zip(cases, texts, strict=True):
                    yield Outcome(
                        key=keys[i],
                        task=job.title,
                        mode=job.mode,
                        length=job.length,
                        method=entry.label,
                        index=i,
                        depth=sample.meta.get("depth"),
                        score=metrics.score(sample, text),
                        output=text,
                        expected=list(sample.answers),
                        tokens=int(fork.get_seq_length()),
                        nbytes=size // len(cases),
                        full=full // len(cases),
                        seconds=round(seconds, 6),
                        encode=round(encode, 6),
                    )
            if group.feeds and n < last:
                ids, mask = self._feed(ids, mask, group.feeds[n], cache)

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def _answer(
        self, ids: Tensor, mask: Tensor, questions: list[list[int]], cache: KVCache | DynamicCache, limit: int
    ) -> tuple[list[str], float]:
        """(texts, seconds per token) of greedy answers after the rows that the cache holds."""
        asked, shown = left_pad(questions, self._pad, ids.device)
        ids, mask = torch.cat([ids, asked], 1), torch.cat([mask, shown], 1)
        started = time.perf_counter()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=self._pad,
        )
        seconds = time.perf_counter() - started
        new = out[:, ids.shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True), seconds / max(1, new.shape[1])

    @torch.inference_mode()
    def _feed(self, ids: Tensor, mask: Tensor, tokens: list[int], cache: Any) -> tuple[Tensor, Tensor]:
        """Let the cache see these tokens; returns all it has seen."""
        new = torch.tensor([tokens], device=ids.device)
        self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)

    @torch.inference_mode()
    def _cache(self, entry: Entry, held: dict[str, int], dense: DynamicCache, mask: Tensor) -> KVCache | DynamicCache:
        """The entry's cache, filled with the prefilled contexts."""
        if entry.method is None:
            full = copy.deepcopy(dense)
            for layer in full.layers if entry.label == ZEROS else []:
                layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)  # type: ignore
            return full
        method = entry.method
        if entry.like is not None and self.shape is not None:
            layers = sum(info.compressed for info in self.attachment.layers)
            method = StreamingLLM.within(held[entry.like] / layers, self.shape)
        cache = make_cache(self.model, method)
        fill(cache, dense, self.attachment, None if bool(mask.all()) else mask)
        return cache


def _bytes(cache: Any) -> tuple[int, int]:
    """(bytes held, bytes of the full cache)."""
    if isinstance(cache, KVCache):
        report = cache.report()
        return report.nbytes, report.full
    size = nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))
    return size, size
