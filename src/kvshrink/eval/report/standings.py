"""Where a method stands: its mean score over tasks with an interval, beside bytes, fidelity and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

from kvshrink.eval.report.results import fidelity_groups, known, modes, of, reached, telling, unique
from kvshrink.eval.run.entries import CONTROLS, FULL
from kvshrink.eval.run.stats import bootstrap


@dataclass(frozen=True)
class Mean:
    """Mean score over groups of lines. low, high: 95 % interval, None if a line has none."""

    score: float
    low: float | None
    high: float | None
    byte_ratio: float | None


@dataclass(frozen=True)
class Standing:
    """One method in one mode over its tasks. full: the full cache's mean on the same tasks and lengths.

    lines of all_lines (tasks and lengths of the mode) were measured. delta: mean over tasks of (score - full), with its
    95 % bootstrap interval over tasks.
    time: geometric mean of seconds per token over the full cache's. fidelity: the row to show beside it, if any.
    """

    mode: str
    method: str
    series: str
    target: float | None
    reached: bool
    setting: str | None
    lines: int
    all_lines: int
    mean: Mean
    full: float | None
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    time: float | None
    fidelity: dict | None


def pooled(groups: Sequence[Sequence[dict]]) -> Mean | None:
    """The mean over groups of the means over their lines, None if no line has a score.

    The interval combines those of the lines, as of independent samples: with weights w_i the lower end is
    mean - sqrt(sum (w_i (score_i - low_i))^2), the upper one alike (MOVER: Zou and Donner, Stat. Med. 27 (2008), 1693).
    """
    scored = [group for lines in groups if (group := [e for e in lines if e["score"] is not None])]
    if not scored:
        return None
    weighted = [(1 / (len(scored) * len(group)), e) for group in scored for e in group]
    score = sum(w * e["score"] for w, e in weighted)
    low = high = None
    if all(e["low"] is not None and e["high"] is not None for _, e in weighted):
        low = max(0.0, score - sqrt(sum((w * (e["score"] - e["low"])) ** 2 for w, e in weighted)))
        high = min(1.0, score + sqrt(sum((w * (e["high"] - e["score"])) ** 2 for w, e in weighted)))
    ratios = [known(e["byte_ratio"] for e in group) for group in scored]
    return Mean(score, low, high, _mean([_mean(k) for k in ratios if k]))


def standings(results: dict) -> list[Standing]:
    """Per mode and budget the highest mean score first; controls before all. Over the `telling` lines."""
    found = []
    for mode in modes(results):
        lines = telling(results, mode)
        found += [s for m in unique(e["method"] for e in lines) if (s := _standing(results, lines, m)) is not None]
    rank = {mode: i for i, mode in enumerate(modes(results))}
    # a method without some of its lines has a mean over other tasks
    part = {id(s): s.lines < s.all_lines for s in found}
    return sorted(
        found, key=lambda s: (rank[s.mode], s.series not in CONTROLS, -_budget(s), part[id(s)], -s.mean.score)
    )


def _standing(results: dict, lines: list[dict], method: str) -> Standing | None:
    own = of(lines, method=method)
    names = unique(e["task"] for e in own)
    mean = pooled([of(own, task=name) for name in names])
    if mean is None:
        return None
    pairs = [p for name in names if (p := _pair(of(own, task=name), of(lines, task=name, series=FULL)))]
    deltas = [a - b for a, b in pairs]
    first, timed = own[0], [t for t in known(e["time"] for e in own) if t > 0]
    # one task says nothing about tasks
    low, high = bootstrap(deltas, seed=0) if len(deltas) > 1 and first["series"] != FULL else (None, None)
    same = [e for group in fidelity_groups(results)[:1] for e in group if e["method"] == method]
    return Standing(
        mode=first["mode"],
        method=method,
        series=first["series"],
        target=first["target"],
        reached=reached(own),
        setting=_setting(known(e["setting"] for e in own)),
        lines=len(known(e["score"] for e in own)),
        all_lines=len({(e["task"], e["length"]) for e in lines}),
        mean=mean,
        full=_mean([b for _, b in pairs]),
        delta=_mean(deltas),
        delta_low=low,
        delta_high=high,
        time=exp(sum(map(log, timed)) / len(timed)) if timed else None,
        fidelity=same[0] if same else None,
    )


def _pair(own: list[dict], full: list[dict]) -> tuple[float, float] | None:
    """(mean score, the full cache's) over the lengths of one task where both were measured."""
    other = {e["length"]: e["score"] for e in full}
    both = [(e["score"], other.get(e["length"])) for e in own]
    both = [(a, b) for a, b in both if a is not None and b is not None]
    return (sum(a for a, _ in both) / len(both), sum(b for _, b in both) / len(both)) if both else None


def _setting(found: list[str]) -> str | None:
    """What the budget chose, None if that differs between lengths."""
    return found[0] if len(set(found)) == 1 and found[0] else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _budget(standing: Standing) -> float:
    return -1.0 if standing.target is None else standing.target
