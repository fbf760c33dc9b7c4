"""Tasks, found by file name: generated/<name>.py or stored/<name>.py defines samples(). Nothing to register.

    samples(n, seed, *, tokens, count, **settings) -> list[Sample]

    n       samples (contexts, where several questions share one); the same sample i for every n
    tokens  the prompt, the beginning-of-sequence token and `max_new_tokens` of answer fit into this many
    count   tokens of a text, by the model's tokenizer (`prompt.counter`)

A module may have VARIANTS, {name: settings}: what the suite runs of it. A task is text in, text out: it knows no model,
and the tokenizer only as a counter. Consecutive samples with the same context are several questions on one context.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, final

from kvshrink.errors import EvalError

KINDS = ("generated", "stored")
Count = Callable[[str], int]


@final
@dataclass(frozen=True)
class Sample:
    """One question about one context. The prompt is context + question + answer_prefix, with nothing between.

    The three are apart so that a runner can compress the context before the question is seen.
    The beginning-of-sequence token is not in the text: the runner adds it.

    answers:        the reference texts; what they must all or any be is the metric's business.
    metric:         name of a function in `eval.metrics`, which scores a text from 0 to 1.
    max_new_tokens: tokens to generate, enough for the answer with one token a digit.
    meta:           index, depth (0 start, 1 end of the context), chance (the score of a guess, 0 if absent), chat
                    (False: no chat template, as the benchmark does it) and what the task wants to report.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    meta: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


def names(kind: str | None = None) -> list[str]:
    """The names of all tasks, or of those of one kind. The file name is the task's name everywhere."""
    return sorted(_paths(kind))


def get(name: str) -> ModuleType:
    """The task module called `name`. Raises EvalError listing the known names."""
    known = _paths(None)
    if name not in known:
        raise EvalError(f"No task {name!r}. Known: {', '.join(sorted(known))}.")
    return importlib.import_module(known[name])


def _paths(kind: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for k in KINDS if kind is None else (kind,):
        package = importlib.import_module(f"{__name__}.{k}")
        found |= {m.name: f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)}
    return {name: path for name, path in found.items() if not name.startswith("_")}
