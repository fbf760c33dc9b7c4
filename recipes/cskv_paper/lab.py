"""What every ablation needs: methods fitted once, answers and divergences measured once, all found again by content.

artifacts/       fitted methods, shared by the experiments
outcomes.jsonl   an answer a line
fidelity.jsonl   a document through a cache a line, and other measurements
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from kvshrink.attach import attach
from kvshrink.attach.budget import at_byte_ratio
from kvshrink.attach.factory import digest_of, shapes
from kvshrink.attach.identity import model_key
from kvshrink.errors import EvalError
from kvshrink.eval.run.catalogue import Samples, Skipped, check_context, choices, context_of, gather
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import held_out, plain, track_of
from kvshrink.eval.run.outcomes import Failure, Outcome
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.records import has_track
from kvshrink.eval.run.rounds import AGNOSTIC
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.eval.run.teacher import Track, follow
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.store.log import Log, key_of
from recipes.cskv_paper.rows import LINES, divergence, row

OFFICIAL_CASES = 50  # as many does the bundled file have
PAPER_STEPS, PAPER_LR = 12_000, 5e-5
MOST_LR = 1e-3
AT_ONCE = 4  # trainings between two saves, and caches that are alive beside each other twice this


@dataclass(frozen=True)
class Settings:
    """What is run. only: names of experiments, none for all.

    cases:     samples of each task; documents: held-out texts, of which the last `scored` tokens are compared.
    steps:     optimiser steps of every trained method.
    length:    tokens of documents and of long tasks; None: the model's context, at most 4096.
    """

    model: str
    only: tuple[str, ...] = ()
    cases: int = 20
    documents: int = 4
    scored: int = 64
    steps: int = 1000
    length: int | None = None
    seed: int = 0

    @property
    def lr(self) -> float:
        """So that steps times learning rate is the paper's: fewer steps at its own rate would be half a training."""
        return min(MOST_LR, PAPER_LR * PAPER_STEPS / max(1, self.steps))


class Lab:
    """A model with what is measured on it. The context is compressed before a question is seen, always."""

    def __init__(self, settings: Settings, model: Any, tokenizer, texts: Sequence[str], out: Path) -> None:
        longest = min(context_of(model) or 4096, 4096)
        self.settings = settings if settings.length else replace(settings, length=longest)
        self.model, self.tokenizer, self.texts, self.out = model, tokenizer, texts, Path(out)
        self.outcomes, self.log = Log(self.out / "outcomes.jsonl"), Log(self.out / "fidelity.jsonl")
        self.identity = model_key(model)
        self.failures: list[Failure] = []  # of the experiment that runs
        self.left_out: list[Skipped] = []
        self._gathered: dict[str, tuple[list[Samples], list[Skipped]]] = {}
        check_context(model, self.length)
        if settings.scored > self.length - 2:
            raise EvalError(f"scored={settings.scored} of texts of {self.length} tokens leaves no prefix. Lower it.")
        self.documents = held_out(tokenizer, self.length, settings.documents, settings.seed)

    @property
    def length(self) -> int:
        assert self.settings.length is not None
        return self.settings.length

    @property
    def shape(self) -> LayerShape:
        """Of the first layer that is compressed."""
        return next(s for s in shapes(attach(self.model)) if s is not None)

    def cskv(self, keep: float, **changes: Any) -> CSKV:
        """CSKV with a window of 32 and 4 sinks (the paper: none) everywhere, so that rows differ in one thing."""
        return CSKV(keep=keep, **changes)

    def trained(self, keep: float, init: str = "asvd", **changes: Any) -> CSKV:
        """The paper's training from a start."""
        return self.cskv(keep, **{"init": init, "steps": self.settings.steps, "lr": self.settings.lr, **changes})

    def fit(self, methods: Sequence[CSKV]) -> dict[CSKV, Artifact]:
        """Closed forms in one pass over the text, trained ones a few at a time, since each costs minutes."""
        unique = list(dict.fromkeys(methods))
        parts = [[m for m in unique if not m.steps], *_parts([m for m in unique if m.steps], AT_ONCE)]
        found: dict[CSKV, Artifact] = {}
        for part in parts:
            entries = [Entry(str(i), m) for i, m in enumerate(part)]
            ready = fitted(entries, self.model, self.tokenizer, self.texts, self.out / "artifacts")
            found |= {m: e.method for m, e in zip(part, ready, strict=True)}  # type: ignore[misc]
        return found

    def samples(self, titles: Sequence[str]) -> list[Samples]:
        """The tasks' samples. One that does not fit the context is left out by name."""
        s, found = self.settings, []
        for title in titles:
            if title not in self._gathered:
                cases = min(s.cases, OFFICIAL_CASES) if title == LINES[0] else s.cases
                reference = s.model == "reference"
                made = gather(choices([title]), [self.length], cases, s.seed, self.tokenizer, reference)
                self._gathered[title] = made
            found += self._gathered[title][0]
            self.left_out += self._gathered[title][1]
        return found

    def measure(self, entries: Sequence[Entry], titles: Sequence[str] = LINES) -> dict[str, dict]:
        """{label: row} of every entry: its answers to the tasks, its bytes, its KL on held-out text."""
        outcomes = self._answers(entries, self.samples(titles))
        kl = self._divergences(entries)
        return {
            e.label: row(e, outcomes.get(e.label, []), outcomes.get(entries[0].label, []), kl.get(e.label))
            for e in entries
        }

    def knows(self, parts: tuple) -> bool:
        """Whether `recorded` would measure nothing."""
        return self.log.has(key_of(self.identity, parts))

    def recorded(self, parts: tuple, make: Callable[[], dict]) -> dict:
        """The log's record of a measurement, made now if there is none."""
        key = key_of(self.identity, parts)
        if not self.knows(parts):
            self.log.add({"key": key, **make()})
        return self.log.rows[key]

    def _answers(self, entries: Sequence[Entry], tasks: Sequence[Samples]) -> dict[str, list[Outcome]]:
        found: dict[str, list[Outcome]] = {}
        plans = []
        for x in tasks:
            least = min(len(encode(s, self.tokenizer)[0]) for s in x.samples)
            plans.append((x, self._compressing(entries, least, x.title)))
        with tqdm(total=sum(len(x.samples) * len(own) for x, own in plans), unit="answer") as bar:
            for x, own in plans:
                bar.set_description(x.title)
                runner = Runner(self.model, self.tokenizer, own, isolate=True, identity=self.identity)
                for o in runner.run(Job(x.title, AGNOSTIC, x.length), x.samples, self.outcomes, bar):
                    found.setdefault(o.method, []).append(o)
                self.failures += runner.failures
        return found

    def _divergences(self, entries: Sequence[Entry]) -> dict[str, dict]:
        prefix = self.length - self.settings.scored
        if not self.documents:
            return {}
        # what stands beside an entry has its bytes, so it comes after it
        plain_entries = [e for e in entries if e.method is not None and e.like is None]
        found = self._divergence(self._compressing(plain_entries, prefix - 1, "KL"), prefix)
        beside = []
        for e in entries:
            if e.like is not None and e.like in found:
                reached = at_byte_ratio(StreamingLLM(), found[e.like]["byte_ratio"], self.model, self.length)
                beside.append(replace(e, method=reached.method))
        return found | self._divergence(beside, prefix)

    def _divergence(self, entries: Sequence[Entry], prefix: int) -> dict[str, dict]:
        tracks: dict[str, list[Track]] = {e.label: [] for e in entries}
        for ids in tqdm(self.documents, desc="KL", unit="text", disable=not entries):
            keys = {e.label: key_of(self.identity, "track", _digest(e), ids.tolist(), prefix) for e in entries}
            for part in _parts([e for e in entries if not self.log.has(keys[e.label], has_track)], 2 * AT_ONCE):
                for label, track in self._follow(part, ids, prefix):
                    self.log.add({"key": keys[label], "track": plain(track)})
            for label, key in keys.items():
                if key in self.log.rows:
                    tracks[label].append(track_of(self.log.rows[key]["track"]))
        whole = {label: own for label, own in tracks.items() if len(own) == len(self.documents)}
        return {label: divergence(own, self.settings.seed) for label, own in whole.items()}

    def _follow(self, entries: Sequence[Entry], ids: Tensor, prefix: int) -> Iterator[tuple[str, Track]]:
        """All beside one full cache; where that fails each alone, so that a failure is its own."""
        methods: Mapping = {e.label: e.method for e in entries}
        try:
            yield from follow(self.model, methods, ids, prefix).items()
        except Exception:
            for label, method in methods.items():
                try:
                    yield from follow(self.model, {label: method}, ids, prefix).items()
                except Exception as error:
                    line = (str(error).splitlines() or [""])[0]
                    self.failures.append(Failure(label, "KL", self.length, f"{type(error).__name__}: {line}"))

    def _compressing(self, entries: Sequence[Entry], tokens: int, task: str) -> list[Entry]:
        """The entries that compress something of so many tokens; the others would be the full cache by another name."""
        own = []
        for e in entries:
            method = e.method.method if isinstance(e.method, Artifact) else e.method
            least = 0 if method is None or e.like else _least(method)
            if tokens >= least:
                own.append(e)
            else:
                self.left_out.append(Skipped(task, tokens, f"{e.label} compresses nothing below {least} tokens"))
        return own


def relabelled(artifact: Artifact, **changes: Any) -> Artifact:
    """The same fitted tensors under other settings, of those that a fit does not depend on: window, bits."""
    return Artifact(replace(artifact.method, **changes), artifact.layers, artifact.model, artifact.provenance)


def _least(method: Method) -> int:
    return method.window + method.page + method.sinks + 1


def _digest(entry: Entry) -> str:
    assert entry.method is not None
    return digest_of(entry.method)


def _parts(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]
