"""Measurements of one method as plain values, and which of two is better, with how sure that is."""

from collections.abc import Sequence
from math import log
from statistics import mean
from typing import NamedTuple

from kvshrink.eval.entries import Entry
from kvshrink.eval.fidelity import summary
from kvshrink.eval.measure import CHUNK, MODE
from kvshrink.eval.outcomes import Outcome
from kvshrink.eval.stats import bootstrap, paired, student, wilson
from kvshrink.eval.summary import summarise
from kvshrink.eval.teacher import Track

DIGITS = 6
SURE = 0.05  # of a paired test
LEAST_KL = 1e-9  # below which two are the same
KEYS = ("task", "length", "cases", "score", "low", "high", "kept", "lost", "won", "p")
LINES = "longeval"


class Verdict(NamedTuple):
    """sign: 1 if the first is better, -1 if the second is, 0 if neither is surely. how: the numbers, in words."""

    sign: int
    how: str


def row(entry: Entry, outcomes: Sequence[Outcome], full: Sequence[Outcome], kl: dict | None) -> dict:
    """All that was measured of one entry. lines: both kinds of LongEval lines pooled; a case counts once."""
    both = list(outcomes) if entry.label == "full" else [*full, *outcomes]
    tasks = [line.to_dict() for line in summarise(both, [entry]) if line.method == entry.label]
    pooled = [o for o in outcomes if o.task.startswith(LINES)]
    return {
        "label": entry.label,
        "tasks": [{k: t[k] for k in KEYS} for t in tasks],
        "lines": pool(pooled) if pooled else None,
        "kl": kl,
    }


def pool(outcomes: Sequence[Outcome]) -> dict:
    scores = [o.score for o in outcomes]
    exact = set(scores) <= {0.0, 1.0}
    low, high = wilson(sum(scores), len(scores)) if exact else bootstrap(scores, 0)
    return {
        "cases": len(scores),
        "score": round(mean(scores), DIGITS),
        "low": round(low, DIGITS),
        "high": round(high, DIGITS),
        "kept": round(mean(o.kept for o in outcomes), DIGITS),
        "scores": scores,
    }


def divergence(tracks: Sequence[Track], seed: int) -> dict:
    """KL of the predictions from the full cache's, in nats, with its interval over documents."""
    found = summary(tracks, [], MODE, CHUNK, seed=seed).to_dict()
    names = {"mean": "kl_mean", "low": "kl_low", "high": "kl_high", "dnll": "dnll", "top1": "top1", "kept": "kept"}
    values = {short: found[name] for short, name in names.items()}
    by_document = [round(float(t.kl.mean()), 9) for t in tracks]
    return {"documents": len(tracks), "positions": found["positions"], **values, "by_document": by_document}


def better(a: dict, b: dict) -> Verdict:
    """Whether row a is better than row b: by the answers on the same cases, or else by the KL on the same documents."""
    by_answers, by_kl = _by_answers(a, b), _by_kl(a, b)
    if by_answers.sign or not by_kl.how:
        return by_answers
    if not by_answers.how:
        return by_kl
    return Verdict(by_kl.sign, f"{by_answers.how}; {by_kl.how}")


def _by_answers(a: dict, b: dict) -> Verdict:
    ours, theirs = a["lines"], b["lines"]
    if not ours or not theirs or len(ours["scores"]) != len(theirs["scores"]):
        return Verdict(0, "")
    how = f"{number(ours['score'])} against {number(theirs['score'])} of {ours['cases']} answers"
    if not {*ours["scores"], *theirs["scores"]} <= {0.0, 1.0}:
        return Verdict(0, how)
    p = paired(ours["scores"], theirs["scores"]).p
    sign = (ours["score"] > theirs["score"]) - (ours["score"] < theirs["score"]) if p < SURE else 0
    return Verdict(sign, f"{how}, p = {p:.2g}")


def _by_kl(a: dict, b: dict) -> Verdict:
    """Paired over documents, as the mean logarithm of the ratio."""
    if not a["kl"] or not b["kl"]:
        return Verdict(0, "")
    ratios = [
        log(max(x, LEAST_KL) / max(y, LEAST_KL))
        for x, y in zip(a["kl"]["by_document"], b["kl"]["by_document"], strict=True)
    ]
    how = f"KL {a['kl']['mean']:.3g} against {b['kl']['mean']:.3g}"
    if len(ratios) < 2:
        return Verdict(0, f"{how} on one document")
    low, high = student(ratios)
    sign = 1 if high < 0 else -1 if low > 0 else 0
    return Verdict(sign, how if sign else f"{how}, within the noise of {len(ratios)} documents")


def number(score: float) -> str:
    """.88, 1.00: as the paper writes scores."""
    return f"{score:.2f}".removeprefix("0")
