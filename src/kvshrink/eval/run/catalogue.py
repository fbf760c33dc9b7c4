"""Which samples a suite runs: every generated task and its variants, and stored ones whose file is given."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from types import ModuleType
from typing import Any, get_type_hints

from kvshrink.attach.families import text_config
from kvshrink.errors import EvalError
from kvshrink.eval import tasks
from kvshrink.eval.run import prompt
from kvshrink.eval.tasks import Sample
from kvshrink.methods._types import check_type
from kvshrink.methods.text import parse_settings

NEAR = 0.15  # a task whose samples are this much shorter than asked has a length of its own


@dataclass(frozen=True)
class Choice:
    """A task with settings, under the title that results carry: "passkey", "ruler/vt"."""

    title: str
    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The samples of a task. length: tokens asked for, or what they have if that is much less; tokens: their mean."""

    title: str
    length: int
    tokens: int
    samples: list[Sample]


@dataclass(frozen=True)
class Skipped:
    """A task that cannot be had at a length, and why."""

    task: str
    length: int
    reason: str


def choices(wanted: Sequence[str] = (), stored: Sequence[str] = ()) -> list[Choice]:
    """The tasks called `wanted` ("ruler", "ruler/vt"; none: all generated ones), and stored ones
    ("longbench:subset=qasper,path=FILE").

    Raises EvalError on a name that is not known.
    """
    every = [c for name in tasks.names("generated") for c in _variants(name)]
    for name in wanted:
        if not any(name in (c.title, c.name) for c in every):
            raise EvalError(f"no offline task {name!r}. Known: {', '.join(c.title for c in every)}.")
    found = [c for c in every if not wanted or c.title in wanted or c.name in wanted]
    for text in stored:
        name, _, rest = text.partition(":")
        settings = parse_settings(rest)
        _check(tasks.get(name), settings)
        if not settings.get("hub") and not os.path.exists(str(settings.get("path"))):
            raise EvalError(f"{text!r}: no file or folder {settings.get('path')}. Give path=, or hub=True to download.")
        parts = [str(v) for k, v in settings.items() if k not in ("path", "hub")]
        found.append(Choice("/".join([name, *parts]), name, settings))
    titles = [c.title for c in found]
    if twice := [t for t in titles if titles.count(t) > 1]:
        raise EvalError(f"two tasks are called {twice[0]!r}. Give them another setting, or run them apart.")
    return found


def gather(
    chosen: Sequence[Choice], lengths: Sequence[int], cases: int, seed: int, tokenizer, reference: bool
) -> tuple[list[Samples], list[Skipped]]:
    """`cases` samples of every task at every length that it can have (a few more where they share a context).

    reference: whether the model is the bundled one, which has wordings of its own.
    """
    made: dict[tuple[str, tuple[str, ...]], Samples] = {}
    skipped = []
    for length in lengths:
        for choice in chosen:
            module = tasks.get(choice.name)
            try:
                settings = arguments(module, choice.settings, length, tokenizer, reference)
                samples = make_samples(module, cases, seed, settings)
            except EvalError as error:
                skipped.append(Skipped(choice.title, length, str(error)))
                continue
            samples = _whole_contexts(samples, cases)
            sizes = [sum(map(len, prompt.encode(s, tokenizer))) + s.max_new_tokens for s in samples]
            if max(sizes) > length:
                skipped.append(Skipped(choice.title, length, f"its longest sample takes {max(sizes)} tokens"))
                continue
            tokens = round(mean(sizes))
            label = length if tokens >= (1 - NEAR) * length else round(tokens, -2) or tokens
            # the same short samples come again at every length
            made.setdefault(
                (choice.title, tuple(s.prompt for s in samples)), Samples(choice.title, label, tokens, samples)
            )
    return list(made.values()), skipped


def _whole_contexts(samples: list[Sample], cases: int) -> list[Sample]:
    """The first `cases` samples, and the rest of the last one's context."""
    end = cases
    while end < len(samples) and samples[end].context == samples[end - 1].context:
        end += 1
    return samples[:end]


def arguments(module: ModuleType, given: Mapping[str, Any], tokens: int, tokenizer, reference: bool) -> dict[str, Any]:
    """What a task's samples() is called with: `given`, and length, counter and wording where it takes them.

    Raises EvalError on a setting that the task does not have.
    """
    takes = _check(module, given)
    room = tokens - prompt.overhead(tokenizer)
    offered = {"tokens": room, "count": prompt.counter(tokenizer), "wording": "reference" if reference else "official"}
    return {key: value for key, value in offered.items() if key in takes} | dict(given)


def make_samples(module: ModuleType, cases: int, seed: int, settings: Mapping[str, Any]) -> list[Sample]:
    """The samples of a task. Raises EvalError if it cannot make them, or use the rows of a file."""
    try:
        return module.samples(cases, seed, **settings)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if settings.get("path") is None:
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise EvalError(
            f"task {_name(module)} cannot use the rows of {settings['path']} ({reason}). Take the official file."
        ) from error


def has_own_length(module: ModuleType, settings: Mapping[str, Any]) -> bool:
    """Whether a number of lines says how long a sample is, and tokens do not."""
    lines = inspect.signature(module.samples).parameters.get("lines")
    return lines is not None and settings.get("lines", lines.default) is not None


def context_of(model: Any) -> int | None:
    """Tokens that the model was made for, None if it does not say."""
    return getattr(text_config(model), "max_position_embeddings", None)


def check_context(model: Any, tokens: int, of: str = "") -> None:
    """Raise EvalError if so many tokens are more than the model was made for. of: what they are."""
    most = context_of(model)
    if most is not None and tokens > most:
        what = f"{tokens} tokens ({of})" if of else f"{tokens} tokens"
        raise EvalError(f"{what} are more than the model's context of {most}. Use fewer.")


def _check(module: ModuleType, given: Mapping[str, Any]) -> list[str]:
    """The settings that a task takes. Raises EvalError on one that it does not."""
    takes = list(inspect.signature(module.samples).parameters)
    if wrong := [key for key in given if key not in takes[2:] or key == "count"]:
        known = ", ".join(key for key in takes[2:] if key != "count")
        raise EvalError(f"task {_name(module)} has no setting {wrong[0]!r}. It has: {known}.")
    kinds = get_type_hints(module.samples)
    for key, value in given.items():
        check_type(f"task {_name(module)}: {key}", value, kinds[key])
    return takes


def _name(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[1]


def _variants(name: str) -> list[Choice]:
    variants = getattr(tasks.get(name), "VARIANTS", None)
    if variants is None:
        return [Choice(name, name, {})]
    return [Choice(f"{name}/{variant}", name, dict(settings)) for variant, settings in variants.items()]
