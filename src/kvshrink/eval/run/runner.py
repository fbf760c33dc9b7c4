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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

from kvshrink.attach import attach, make_cache
from kvshrink.attach.factory import digest_of, shapes
from kvshrink.attach.fill import fill, held_by, prefill, wanted_by
from kvshrink.attach.identity import model_key
from kvshrink.cache import KVCache
from kvshrink.eval import metrics
from kvshrink.eval.run import entries as entry_list
from kvshrink.eval.run.entries import ZEROS, Entry
from kvshrink.eval.run.outcomes import Failure, Outcome
from kvshrink.eval.run.rounds import AGNOSTIC, Group, groups, left_pad
from kvshrink.eval.tasks import Sample
from kvshrink.methods._bounded import Bounded
from kvshrink.store.bytes import nbytes
from kvshrink.store.log import Log, key_of
from kvshrink.store.modes import without_dropout
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
    identity: the model's `model_key`, if it is known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer,
        entries: Sequence[Entry],
        batch: int = 1,
        isolate: bool = False,
        identity: str | None = None,
    ) -> None:
        entry_list.check(entries)
        self.model, self.tokenizer, self.entries = model, tokenizer, list(entries)
        self.batch, self.isolate = batch, isolate
        self.attachment = attach(model)
        self.shape = next((s for s in shapes(self.attachment) if s is not None), None)
        self.failures: list[Failure] = []
        self.model_key = identity or model_key(model)

    def run(
        self, job: Job, samples: Sequence[Sample], log: Log | None = None, bar: tqdm | None = None
    ) -> list[Outcome]:
        """All entries on all samples, entry by entry; what the log holds is not run again. The bar counts answers."""
        log = log or Log(None)
        asked = list(groups(samples, job.mode, self.tokenizer, self.batch))
        keys = [self.keys(job, group) for group in asked]
        own = bar if bar is not None else tqdm(total=len(samples) * len(self.entries), desc=job.title, unit="answer")
        failed: dict[str, str] = {}
        for group, by_label in zip(asked, keys, strict=True):
            known = sum(log.has(key, Outcome.of) for by_case in by_label.values() for key in by_case.values())
            own.update(known)
            if known < len(self.entries) * len(group.cases):
                for outcome in self._group(job, group, by_label, log, failed):
                    log.add(asdict(outcome))
                    own.update()
        if bar is None:
            own.close()
        self.failures += [Failure(label, job.title, job.length, error) for label, error in failed.items()]
        return [
            # two budgets may have come to the same setting: one run answers for both
            replace(Outcome(**log.rows[key]), method=entry.label)
            for entry in self.entries
            if entry.label not in failed
            for by_label in keys
            for key in by_label[entry.label].values()
        ]

    def keys(self, job: Job, group: Group) -> dict[str, dict[int, str]]:
        """{label: {case: hash of all that the outcome depends on}}: a resumed run takes no other's."""
        found: dict[str, dict[int, str]] = {}
        for entry in self.entries:
            method = entry.label if entry.method is None else digest_of(entry.method)
            shared = (self.model_key, str(self.model.dtype), method, entry.like, job.title, job.mode, job.length)
            found[entry.label] = {
                i: key_of(shared, self.batch, reads, sample.answers, sample.metric, sample.max_new_tokens, sample.meta)
                for (i, sample), reads in zip(group.cases, group.reads().values(), strict=True)
            }
        return found

    def _group(
        self, job: Job, group: Group, keys: dict[str, dict[int, str]], log: Log, failed: dict[str, str]
    ) -> Iterator[Outcome]:
        try:
            ids, mask = left_pad(group.contexts, self._pad, next(self.model.parameters()).device)
            wanted = wanted_by(entry.method for entry in self.entries)
            dense = prefill(self.model, ids, None if bool(mask.all()) else mask, wanted)
        except Exception as error:
            if not self.isolate:
                raise
            failed |= {entry.label: _line(error) for entry in self.entries if entry.label not in failed}
            return
        held: dict[str, int] = {}  # bytes of a row
        for entry in self.entries:
            own = keys[entry.label]
            rows = [Outcome(**log.rows[key]) for key in own.values() if key in log.rows]
            if len(rows) < len(own) and entry.label not in failed:
                try:
                    for outcome in self._entry(job, group, entry, own, log, (dense, ids, mask), held):
                        rows.append(outcome)
                        yield outcome
                except Exception as error:
                    if not self.isolate:
                        raise
                    failed[entry.label] = _line(error)
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
        started = _now(ids)
        cache = self._cache(entry, held, dense, mask)
        encode = _now(ids) - started
        todo = [any(keys[i] not in log.rows for i, _ in cases) for cases in group.rounds]
        last = max(n for n, wanted in enumerate(todo) if wanted)
        for n, (cases, questions) in enumerate(zip(group.rounds, group.questions, strict=True)):
            if n > last:
                return
            if todo[n]:
                fork = cache if n == last else copy.deepcopy(cache)
                texts, seconds = self._answer(ids, mask, questions, fork, [s.max_new_tokens for _, s in cases])
                size, full = _bytes(fork)
                for (i, sample), text in zip(cases, texts, strict=True):
                    yield Outcome(
                        key=keys[i],
                        task=job.title,
                        mode=job.mode,
                        length=job.length,
                        method=entry.label,
                        index=i,
                        context=sample.meta.get("context", i),
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

    @without_dropout
    @torch.inference_mode()
    def _answer(
        self, ids: Tensor, mask: Tensor, questions: list[list[int]], cache: KVCache | DynamicCache, limits: list[int]
    ) -> tuple[list[str], float]:
        """(texts, seconds per token) of greedy answers after the rows that the cache holds, a limit of tokens each."""
        asked, shown = left_pad(questions, self._pad, ids.device)
        ids, mask = torch.cat([ids, asked], 1), torch.cat([mask, shown], 1)
        eos = self.model.generation_config.eos_token_id
        started = _now(ids)
        with greedy(self.model, eos, self._pad):
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=max(limits)
            )
        seconds = _now(ids) - started
        ends = set(eos) if isinstance(eos, list) else {eos}
        rows = [_cut(row, limit, ends) for row, limit in zip(out[:, ids.shape[1] :].tolist(), limits, strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return texts, seconds / max(1, out.shape[1] - ids.shape[1])

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
            full: Any = copy.deepcopy(dense)
            for layer in full.layers if entry.label == ZEROS else []:
                layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
            return full
        method = entry.method
        if entry.like is not None and self.shape is not None:
            layers = sum(info.compressed for info in self.attachment.layers)
            # sliding-window layers are the same in every cache
            fixed = sum(
                sum(t.nbytes for t in held_by(x)) // len(mask)
                for x, info in zip(dense.layers, self.attachment.layers, strict=True)
                if not info.compressed
            )
            assert isinstance(method, Bounded)
            method = method.within((held[entry.like] - fixed) / layers, self.shape)
        cache = make_cache(self.model, method)
        fill(cache, dense, self.attachment, None if bool(mask.all()) else mask)
        return cache


@contextmanager
def greedy(model: Any, eos: int | list[int] | None, pad: int) -> Iterator[None]:
    """Generation without the model's own settings: a repetition penalty or sampling would not be greedy, and
    `generate` takes whatever it is not told from them."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    try:
        yield
    finally:
        model.generation_config = own


def _now(like: Tensor) -> float:
    """Seconds, after the device has done what it was given."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _cut(row: list[int], limit: int, ends: set) -> list[int]:
    """The answer of a row: up to its own limit and end, behind which a batch goes on with pads."""
    row = row[:limit]
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _bytes(cache: Any) -> tuple[int, int]:
    """(bytes held, bytes of the full cache)."""
    if isinstance(cache, KVCache):
        report = cache.report()
        return report.nbytes, report.full
    size = nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))
    return size, size
