"""What is compared at equal bytes: the series, each at every budget, and every quantiser at the bits that fit."""

import re
from dataclasses import replace
from typing import Any

import rivals

from kvshrink import CSKV, RTN, Spectral, methods
from kvshrink.attach.budget import TOLERANCE, at_byte_ratio, promised
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.tasks import Sample
from kvshrink.methods import name_of

BUDGETS = (0.2, 0.125, 0.0625, 0.04)
TASKS = ("needle", "needle_among", "passkey/book", "longeval/filled")
REAL_TASKS = ("needle", "needle_among", "ruler/niah_single_1", "ruler/niah_single_2[books]")  # what SmolLM2 can do
DIVERGED = 8  # samples of each task whose KL is measured
MAIN = "spectral"


def seen(sample: Sample) -> Sample:
    """The same with the question in the context, but for its last words."""
    head, _, tail = (sample.question + sample.answer_prefix).rpartition(" ")
    return replace(sample, context=sample.context + head, question=" " + tail if head else tail, answer_prefix="")


def series(steps: int) -> dict[str, Any]:
    """Label to method. The first are compared in answers too, the others (how it is fitted) in KL only."""
    return {
        MAIN: Spectral(),
        "CSKV pca int4": CSKV(bits=4),
        "CSKV paper int4": CSKV.paper(bits=4, steps=steps),
        "KIVI": methods.build("kivi", {}),
        "int4": RTN(bits=4),
        "int3": RTN(bits=3),
        "int2": RTN(bits=2),
        "StreamingLLM": methods.build("streaming_llm", {}),
        "spectral, scalar": Spectral(code="scalar"),
        "spectral, uniform": Spectral(allocation="uniform"),
        "spectral, energy": Spectral(allocation="energy"),
        "spectral, query + output": Spectral(key_metric="query", value_metric="output"),
        "spectral, unrotated": Spectral(rotate=False),
        "spectral, no 1 bit": Spectral(widths=(2, 3, 4, 8)),
        "CSKV pca int4, query + output": CSKV(bits=4, key_metric="query", value_metric="output"),
    }


def real_series(steps: int) -> dict[str, Any]:
    """What is compared on a real model, the first ones in answers too."""
    fixed = {f"{name} {b}": methods.build(name, {"bits": b}) for name in ("tcq", "turboquant") for b in (3, 2, 4)}
    others = {
        "kvarn 4": {},
        "kvarn 2": {"bits": 2, "value_bits": None},
        "oscar 2": {"bits": 2},
        "kvquant 2": {"bits": 2},
    }
    return {
        MAIN: Spectral(),
        "CSKV budget": CSKV(budget=0.1),
        "StreamingLLM": methods.build("streaming_llm", {}),
        **fixed,
        "CSKV pca int4": CSKV(bits=4),
        "int4": RTN(bits=4),
        **{label: methods.build(label[:-2], settings) for label, settings in others.items()},
        "spectral, balanced": Spectral(speed="balanced"),
        "spectral, fast": Spectral(speed="fast"),
        "spectral, exact window": Spectral(window_bits=None),
        "spectral, scalar": Spectral(code="scalar"),
        "CSKV budget, int4": CSKV(budget=0.1, bits=4),
        "CSKV paper int4": CSKV.paper(bits=4, steps=steps),
    }


ANSWERED = 8, 6  # series whose answers are compared, of the bundled model and of a real one
FIXED = re.compile(r"(int|tcq |turboquant |kvquant |kvarn |oscar )\d")  # at their own bytes


def plan(model, length: int, named: dict[str, Any], only: list[str]) -> list[Entry]:
    """Every series (or those of `only`) at every budget, at this length."""
    out = []
    for label, method in named.items():
        if only and label not in only:
            continue
        if FIXED.fullmatch(label):
            out.append(Entry(label, method, None, label, None, True, f"bits={method.bits}"))
            continue
        for budget in BUDGETS:
            at = at_byte_ratio(method, budget, model, length)
            setting = f"{method.budget_setting}={getattr(at.method, method.budget_setting):.4g}"
            out.append(Entry(f"{label} @{budget:g}", at.method, None, label, budget, at.reached, setting))
    return out


def fitting(model: Any, length: int) -> list[Entry]:
    """Of every quantiser, the most bits that stay under the largest budget (or within 5 % of it)."""
    found: dict[str, tuple[float, Entry]] = {}
    for e in rivals.plan():
        size, name = promised(e.method, model, length), name_of(e.method)
        if 0 < size <= (1 + TOLERANCE) * BUDGETS[0] and size > found.get(name, (0.0, e))[0]:
            found[name] = size, e
    return [replace(e, series=e.label, setting=e.label) for _, e in found.values()]
