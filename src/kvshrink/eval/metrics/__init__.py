"""Scores of an output from 0 to 1, found by name: each public function of a module here. Nothing to register.

metric(text, answers, meta) -> float    text is what the model wrote; answers and meta are the sample's
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from kvshrink.errors import EvalError

Metric = Callable[[str, tuple[str, ...], dict[str, Any]], float]


@cache
def known() -> dict[str, Metric]:
    """{name: function} of all metrics."""
    found: dict[str, Metric] = {}
    for entry in pkgutil.iter_modules(__path__):
        if entry.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert name not in found, f"two metrics are called {name}"
                found[name] = function
    return found


def get(name: str) -> Metric:
    """The metric called `name`. Raises EvalError listing the known names."""
    if name not in known():
        raise EvalError(f"No metric {name!r}. Known: {', '.join(sorted(known()))}.")
    return known()[name]


def score(sample: Any, text: str) -> float:
    """The score of an output for a `tasks.Sample`, by the sample's own metric."""
    return float(get(sample.metric)(text, sample.answers, sample.meta))
