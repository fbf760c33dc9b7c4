"""Evaluation at equal real bytes: tasks, metrics, a runner that makes every score read the cache, fidelity, reports.

    tasks/    samples: context, question, answers
    metrics/  an answer to a score
    run/      entries at a budget, one exact prefill, the runner, fidelity, a suite
    report/   summaries, intervals, figures, pages

What scripts use is here by name, imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvshrink.attach.budget import at_byte_ratio as at_byte_ratio
    from kvshrink.eval.report.summary import cells as cells
    from kvshrink.eval.report.summary import summarise as summarise
    from kvshrink.eval.run import prompt as prompt
    from kvshrink.eval.run.entries import Entry as Entry
    from kvshrink.eval.run.fidelity import fidelity as fidelity
    from kvshrink.eval.run.perplexity import perplexity as perplexity
    from kvshrink.eval.run.runner import Job as Job
    from kvshrink.eval.run.runner import Runner as Runner

_PLACES = {
    "Entry": "eval.run.entries",
    "Job": "eval.run.runner",
    "Runner": "eval.run.runner",
    "at_byte_ratio": "attach.budget",
    "cells": "eval.report.summary",
    "fidelity": "eval.run.fidelity",
    "perplexity": "eval.run.perplexity",
    "prompt": "eval.run",
    "summarise": "eval.report.summary",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kvshrink.{_PLACES[name]}"), name)
