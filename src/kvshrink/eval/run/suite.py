"""The suite: methods at equal real bytes, on every offline task that the model's context allows.

A run writes into one folder and can be interrupted at any time: answers and fidelity records are appended as they come,
fitted artifacts are kept, and what is there is not made again. `report.build` turns the folder into a page.

    outcomes.jsonl   an answer a line
    fidelity.jsonl   a document through a cache a line
    artifacts/       fitted methods
    results.json     tables made of them, with all settings
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvshrink.attach.budget import TOLERANCE, at_byte_ratio, promised
from kvshrink.attach.identity import identity_of, model_key
from kvshrink.errors import EvalError, SettingError
from kvshrink.eval.report.results import FORMAT
from kvshrink.eval.report.summary import Line, summarise
from kvshrink.eval.run.catalogue import Choice, Samples, Skipped, check_context, choices, context_of, gather
from kvshrink.eval.run.entries import FULL, ZEROS, Entry, parse
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import Measured, Meter, held_out
from kvshrink.eval.run.outcomes import Failure, Outcome
from kvshrink.eval.run.rounds import AGNOSTIC, MODES, MULTI_TURN, groups, shares_contexts
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.methods._roles import Method
from kvshrink.methods.text import parse_settings
from kvshrink.store import files
from kvshrink.store.log import Log

SHORTEST = 16  # tokens of a sample
LONGEST = 4096  # tokens, unless longer ones are asked for


@dataclass(frozen=True)
class Settings:
    """What a suite compares.

    methods:   texts for `entries.parse`, without controls and without the setting that a budget chooses.
    byte_ratio:      budgets: bytes held over the full cache's, everything counted.
    tasks:     titles or names of generated tasks, none for all; stored: texts of stored tasks with their path=.
    lengths:   tokens of a sample, none for the model's context (at most 4096), its half and its quarter.
    modes:     of agnostic, aware, multi_turn; the last only where a context has several questions.
    cases:     samples per task; where contexts are shared, whole contexts of at least as many questions.
    documents: held-out texts for fidelity, 0 for none; scored: their last tokens, which are compared.
    """

    model: str
    methods: tuple[str, ...]
    byte_ratio: tuple[float, ...]
    tasks: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    modes: tuple[str, ...] = (AGNOSTIC, MULTI_TURN)
    cases: int = 10
    documents: int = 4
    scored: int = 128
    seed: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for text in self.methods:
            entry = parse(text)
            if not isinstance(entry.method, Method) or entry.like:
                raise SettingError(f"{text!r}: name methods that shrink; full and zeros are always there.")
            if entry.method.budget_setting in parse_settings(text.partition(":")[2]):
                raise SettingError(f"{text!r}: {entry.method.budget_setting} is what the budget sets. Leave it out.")
        for name, given in (
            ("methods", self.methods),
            ("byte_ratio", self.byte_ratio),
            ("modes", self.modes),
            ("lengths", self.lengths),
        ):
            if not (given or name == "lengths") or len(set(given)) < len(given):
                raise SettingError(f"{name}={','.join(map(str, given))!r}: name at least one, and none twice.")
        if short := [n for n in self.lengths if n < SHORTEST]:
            raise SettingError(f"lengths={short[0]} is not possible. Use {SHORTEST} tokens or more.")
        if wrong := [m for m in self.modes if m not in MODES]:
            raise SettingError(f"mode {wrong[0]!r} is not known. Use some of {', '.join(MODES)}.")
        if wrong := [k for k in self.byte_ratio if not 0 < k <= 1]:
            raise SettingError(f"byte_ratio={wrong[0]} is not possible. Use shares of bytes above 0, up to 1.")


class Suite:
    """One run of `settings` on a loaded model; texts are what methods are fitted on."""

    def __init__(self, settings: Settings, model: Any, tokenizer, texts: Sequence[str], out: Path) -> None:
        self.model, self.tokenizer, self.texts, self.out = model, tokenizer, texts, Path(out)
        self.settings = settings if settings.lengths else replace(settings, lengths=_lengths(model))
        self.chosen: list[Choice] = choices(settings.tasks, settings.stored)
        self.log = Log(self.out / "outcomes.jsonl")
        self.failures: list[Failure] = []
        check_context(model, max(self.settings.lengths))
        if settings.documents and settings.scored > min(self.settings.lengths) - 2:
            least = min(self.settings.lengths)
            raise EvalError(f"scored={settings.scored} of texts of {least} tokens leaves no prefix. Lower scored.")

    def run(self, command: str) -> dict:
        """Everything; returns what results.json holds. command: how to make it again."""
        s = self.settings
        reference = s.model == "reference"
        for length in s.lengths if s.documents else ():  # refused now rather than after hours
            held_out(self.tokenizer, length, s.documents, s.seed)
        samples, skipped = gather(self.chosen, s.lengths, s.cases, s.seed, self.tokenizer, reference)
        if not samples and not s.documents:
            raise EvalError(f"no task fits {max(s.lengths)} tokens: {skipped[0].reason if skipped else 'none chosen'}")
        plans = self._entries(samples)
        jobs = self._jobs(samples, skipped)
        if samples and not jobs and not s.documents:
            raise EvalError(f"no task can be had in the modes {', '.join(s.modes)}. Name another mode or task.")
        lines, grid = self._answers(jobs, plans)
        measured = self._measured(plans)
        data = {
            "format": FORMAT,
            "settings": self._described(command),
            "lines": [line.to_dict() for line in lines],
            "grid": grid,
            "fidelity": measured.fidelity,
            "layers": measured.layers,
            "memory": measured.memory,
            "skipped": [asdict(x) for x in skipped],
            "failures": [asdict(x) for x in self.failures],
        }
        files.write_json(self.out / "results.json", data)
        return data

    def _entries(self, samples: Sequence[Samples]) -> dict[int, list[Entry]]:
        """The entries for each number of tokens: controls, then every method at every budget, fitted."""
        sizes = sorted({x.tokens for x in samples} | set(self.settings.lengths))
        budgets = _Budgets(self.model)
        plans = {
            n: [budgets.entry(m, k, n) for m in self.settings.methods for k in self.settings.byte_ratio] for n in sizes
        }
        flat = fitted([e for n in sizes for e in plans[n]], self.model, self.tokenizer, self.texts, self._artifacts)
        each = len(self.settings.methods) * len(self.settings.byte_ratio)
        controls = [Entry(FULL, None, series=FULL), Entry(ZEROS, None, series=ZEROS)]
        return {n: controls + flat[i * each : (i + 1) * each] for i, n in enumerate(sizes)}

    @property
    def _artifacts(self) -> Path:
        return self.out / "artifacts"

    def _jobs(self, samples: Sequence[Samples], skipped: list[Skipped]) -> list[tuple[Samples, str]]:
        """Every task in every mode that it can have; the rest is added to `skipped`."""
        jobs = []
        for x in samples:
            for mode in self.settings.modes:
                if mode == MULTI_TURN and not shares_contexts(x.samples):
                    continue
                try:
                    longest = max(g.tokens() for g in groups(x.samples, mode, self.tokenizer, self.settings.batch))
                    check_context(self.model, longest)
                except EvalError as error:  # a template that has no turns, a conversation beyond the context
                    skipped.append(Skipped(x.title, x.length, f"mode {mode}: {error}"))
                    continue
                jobs.append((x, mode))
        return jobs

    def _answers(
        self, jobs: Sequence[tuple[Samples, str]], plans: dict[int, list[Entry]]
    ) -> tuple[list[Line], list[dict]]:
        lines, grid = [], []
        total = sum(len(x.samples) * len(plans[x.tokens]) for x, _ in jobs)
        identity, batch = model_key(self.model), self.settings.batch
        with tqdm(total=total, unit="answer") as bar:
            for x, mode in jobs:
                bar.set_description(f"{x.title} {x.length} {mode}")
                runner = Runner(self.model, self.tokenizer, plans[x.tokens], batch, isolate=True, identity=identity)
                outcomes = runner.run(Job(x.title, mode, x.length), x.samples, self.log, bar)
                self.failures += runner.failures
                lines += summarise(outcomes, plans[x.tokens])
                grid += _grid(outcomes, plans[x.tokens])
        return lines, grid

    def _measured(self, plans: dict[int, list[Entry]]) -> Measured:
        s = self.settings
        meter = Meter(self.model, self.tokenizer, s.documents, s.scored, s.seed, Log(self.out / "fidelity.jsonl"))
        measured = meter.run({length: plans[length] for length in s.lengths} if s.documents else {})
        self.failures += measured.failures
        return measured

    def _described(self, command: str) -> dict:
        versions = {name: version(name) for name in ("kvshrink", "torch", "transformers")}
        device = next(self.model.parameters()).device
        return asdict(self.settings) | {
            "tasks": [c.title for c in self.chosen],
            "command": command,
            "fingerprint": identity_of(self.model).digest,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": versions | {"python": platform.python_version()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "calibration": {"texts": len(self.texts), "characters": sum(map(len, self.texts))},
            "date": time.strftime("%Y-%m-%d"),
        }


class _Budgets:
    """Entries at budgets. A setting found for one length is used for others where it fits, so that few are fitted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.found: dict[tuple[str, float], list[Method]] = {}

    def entry(self, text: str, target: float, tokens: int) -> Entry:
        series = parse(text)
        assert isinstance(series.method, Method)
        reached = at_byte_ratio(series.method, target, self.model, tokens)
        known = self.found.setdefault((text, target), [])
        for method in known:
            ratio = promised(method, self.model, tokens)
            if (1 - TOLERANCE / 2) * target <= ratio <= target:
                reached = replace(reached, method=method, reached=True)
        if reached.method not in known:
            known.append(reached.method)
        name = reached.method.budget_setting
        setting = f"{name}={getattr(reached.method, name)}" if name else ""
        return Entry(
            f"{series.label} @{target:g}", reached.method, None, series.label, target, reached.reached, setting
        )


def _lengths(model: Any) -> tuple[int, ...]:
    most = min(context_of(model) or LONGEST, LONGEST)
    return most // 4, most // 2, most


def _grid(outcomes: Sequence[Outcome], entries: Sequence[Entry]) -> list[dict]:
    """Mean score per method and depth, for tasks that hide one thing at a depth."""
    known = {e.label: e for e in entries}
    cells: dict[tuple[str, float], list[Outcome]] = {}
    for o in outcomes:
        if o.depth is not None:
            cells.setdefault((o.method, round(o.depth, 4)), []).append(o)
    return [
        {
            "task": group[0].task,
            "mode": group[0].mode,
            "method": method,
            "series": known[method].series,
            "target": known[method].target,
            "length": group[0].length,
            "depth": depth,
            "score": sum(o.score for o in group) / len(group),
            "cases": len(group),
        }
        for (method, depth), group in cells.items()
    ]
