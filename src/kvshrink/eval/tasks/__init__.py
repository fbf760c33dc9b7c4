"""Retrieval tasks, found by file name: tasks/<name>.py defines samples() and score(). Nothing to register.

    samples(n, seed, **settings) -> list[Sample]   the same sample i for every n
    score(sample, text) -> float                   1.0 right, 0.0 wrong; text is what the model wrote

A task is text in, text out: it knows no model and no tokenizer.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any, final

from kvshrink.errors import EvalError


@final
@dataclass(frozen=True)
class Sample:
    """One question about one context. The prompt is context + question + answer_prefix, with nothing between.

    The three are apart so that a runner can compress the context before the question is seen.
    The beginning-of-sequence token is not in the text: the runner adds it.

    answers:        the texts that count as right.
    max_new_tokens: tokens to generate, enough for the answer with one token a digit.
    meta:           index, depth (0 start, 1 end of the context) and what the task wants to report.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    meta: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


def names() -> list[str]:
    """The names of all tasks. The file name is the task's name everywhere."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The task module called `name`. Raises EvalError listing the known names."""
    if name not in names():
        raise EvalError(f"No task {name!r}. Known: {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}")
