"""Measurements of one method as plain values, and which of two is better, with how sure that is."""

from collections.abc import Sequence
from math import log
from statistics import mean
from typing import NamedTuple

from kvshrink.eval.report.summary import summarise
from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.eval.run.fidelity import summary
from kvshrink.eval.run.measure import CHUNK, MODE
from kvshrink.eval.run.outcomes import Outcome
from kvshrink.eval.run.stats import bootstrap, paired, student, wilson
from kvshrink.eval.run.teacher import Track

DIGITS = 6
SURE = 0.05  # of a paired test
LEAST_KL = 1e-9  # below which two are the same
KEYS = ("task", "length", "cases", "score", "low", "high", "byte_ratio", "lost", "won", "p")
LINES = ("longeval/official", "longeval/generated")
LONG = ("needle", "passkey/book")


class Verdict(NamedTuple):
    """sign: 1 if the first is better, -1 if the second is, 0 if neither is surely. how: the numbers, in words.

    by: what decided, "answers" or "KL".
    """

    sign: int
    how: str
    by: str = ""


def row(entry: Entry, outcomes: Sequence[Outcome], full: Sequence[Outcome], kl: dict | None) -> dict:
    """All that was measured of one entry. lines, long: the tasks of each kind pooled, None unless all were answered."""
    both = list(outcomes) if entry.label == FULL else [*full, *outcomes]
    tasks = [line.to_dict() for line in summarise(both, [entry]) if line.method == entry.label]
    found: dict = {"label": entry.label, "tasks": [{k: t[k] for k in KEYS} for t in tasks], "kl": kl}
    for kind, titles in (("lines", LINES), ("long", LONG)):
        own, whole = ([o for o in x if o.task in titles] for x in (outcomes, full))
        found[kind] = pool(own) if own and len(own) == len(whole) else None
    return found


def pool(outcomes: Sequence[Outcome]) -> dict:
    scores = [o.score for o in outcomes]
    exact = set(scores) <= {0.0, 1.0}
    low, high = wilson(sum(scores), len(scores)) if exact else bootstrap(scores, 0)
    return {
        "cases": len(scores),
        "score": round(mean(scores), DIGITS),
        "low": round(low, DIGITS),
        "high": round(high, DIGITS),
        "byte_ratio": round(mean(o.byte_ratio for o in outcomes), DIGITS),
        "scores": scores,
    }


def divergence(tracks: Sequence[Track], seed: int) -> dict:
    """KL of the predictions from the full cache's, in nats, with its interval over documents."""
    found = summary(tracks, [], MODE, CHUNK, seed=seed).to_dict()
    names = {
        "mean": "kl_mean",
        "low": "kl_low",
        "high": "kl_high",
        "dnll": "dnll",
        "top1": "top1",
        "byte_ratio": "byte_ratio",
    }
    values = {short: found[name] for short, name in names.items()}
    by_document = [round(float(t.kl.mean()), 9) for t in tracks]
    return {"documents": len(tracks), "positions": found["positions"], **values, "by_document": by_document}


def better(a: dict, b: dict, kind: str = "lines") -> Verdict:
    """Whether row a is better than row b: by the answers on the same cases, or else by the KL on the same documents."""
    by_answers, by_kl = _by_answers(a[kind], b[kind]), _by_kl(a, b)
    if by_answers.sign or not by_kl.how:
        return by_answers
    if not by_answers.how:
        return by_kl
    return Verdict(by_kl.sign, f"{by_answers.how}; {by_kl.how}", by_kl.by)


def keeps(full: dict, own: dict, near: float) -> bool | None:
    """Whether a row's score on lines is within `near` of another's; None if it seems not, and is not surely lower."""
    if not full["lines"] or not own["lines"]:
        return None
    if full["lines"]["score"] - own["lines"]["score"] <= near:
        return True
    return False if better(full, own).sign > 0 else None


def nothing(own: dict, most: float) -> Verdict:
    """Whether a row answers (nearly) no lines: 1 if the score is at most `most`, -1 if it is surely above."""
    lines = own["lines"]
    how = f"{number(lines['score'])} [{number(lines['low'])}-{number(lines['high'])}]"
    return Verdict(1 if lines["score"] <= most else -1 if lines["low"] > most else 0, how, "answers")


def _by_answers(ours: dict | None, theirs: dict | None) -> Verdict:
    if not ours or not theirs or len(ours["scores"]) != len(theirs["scores"]):
        return Verdict(0, "")
    how = f"{number(ours['score'])} against {number(theirs['score'])} of {ours['cases']} answers"
    if not {*ours["scores"], *theirs["scores"]} <= {0.0, 1.0}:
        return Verdict(0, how)
    p = paired(ours["scores"], theirs["scores"]).p
    sign = (ours["score"] > theirs["score"]) - (ours["score"] < theirs["score"]) if p < SURE else 0
    return Verdict(sign, f"{how}, p = {p:.2g}", "answers" if sign else "")


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
    return Verdict(sign, how if sign else f"{how}, within the noise", "KL" if sign else "")


def number(score: float) -> str:
    """.88, 1.00: as the paper writes scores."""
    return f"{score:.2f}".removeprefix("0")
