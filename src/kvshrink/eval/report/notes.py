"""What a reader must know to trust the numbers, with this run's own counts in it."""

from collections.abc import Sequence

from kvshrink.eval.report.results import known, modes, silent, unique
from kvshrink.eval.report.standings import Standing
from kvshrink.eval.run.entries import CONTROLS, ZEROS

OF_FULL = (
    "of full cache = bytes really held at the end / bytes of the full cache for the same tokens. Everything is "
    "counted: codes, latents, scales, the exact window and first tokens, positions."
)
MODES = {
    "agnostic": "the context is compressed before the question is seen; as a cache that serves many questions must.",
    "aware": "the question stands in the context when it is compressed, which helps methods that choose what to keep.",
    "multi_turn": "several questions follow one another on one context, compressed once; earlier questions and answers "
    "stay in the cache.",
}
ALPHA = 0.05


def notes(results: dict, board: Sequence[Standing]) -> list[tuple[str, str]]:
    """(heading, sentences)"""
    found = [
        ("Bytes", OF_FULL + " What a method fits once per model is not in it."),
        (
            "Every score is read through the cache",
            "Prefill is exact for every method, so a score that is read from the prefill itself (a perplexity in one "
            "forward, multiple choice by likelihood) would equal the full cache's whatever a method loses. Here the "
            "context is compressed first; question, answer and scored tokens then see only what the cache holds.",
        ),
        ("Modes", " ".join(f"{m}: {MODES.get(m, 'as the suite defines it.')}" for m in modes(results))),
        (
            "Controls",
            "full is the uncompressed cache. zeros keeps the context's place but with keys and values of zero: its "
            "score is that of a guess, and a method down there has lost the context." + _unknown_zeros(results),
        ),
        ("Left out of the means", _silent(results)),
        ("Intervals", _intervals()),
        ("Comparisons", _comparisons(results["lines"])),
        ("Few cases", _few(results["lines"])),
    ]
    if missed := unique(s.method for s in board if not s.reached):
        found.append(
            (
                "Budgets not reached",
                f"{', '.join(missed)}: the method has no setting at that size and stands at its nearest one. Its marks "
                "are hollow; compare it at the bytes that it holds, not under its heading.",
            )
        )
    if results["fidelity"]:
        found.append(
            (
                "Fidelity",
                "KL(full || method) in nats, from the next-token distributions on the same true tokens. It sees damage "
                "before answers flip. Read compressed: the share of positions whose prediction read compressed "
                "tokens at all; the others cannot differ. A perplexity below the full cache's is no gain.",
            )
        )
    found.append(("Time", "Per token, over the full cache's in the same run on the same machine; geometric mean."))
    return [(head, text) for head, text in found if text]


def _silent(results: dict) -> str:
    left = silent(results)
    if not left:
        return ""
    return (
        "Where the full cache is not above zeros (95 % paired interval) the model cannot do the task and no method has "
        f"anything to lose; such lines are shown and not averaged: {'; '.join(left)}. The choice looks at full and "
        "zeros alone, but on the same samples: full is a little flattered where cases are few."
    )


def holm(p: Sequence[float], alpha: float = ALPHA) -> int:
    """How many of the p values stay significant when all are tested (Holm, Scand. J. Stat. 6 (1979), 65-70)."""
    count = 0
    for i, value in enumerate(sorted(p)):
        if value > alpha / (len(p) - i):
            break
        count += 1
    return count


def _intervals() -> str:
    return (
        "All are 95 %. A task's score: Wilson where scores are 0 or 1, else a percentile bootstrap; a context with "
        "several questions counts once, by their mean. Fidelity: Student's t over documents, bootstrap above 20. "
        "The difference to the full cache: a paired bootstrap over the same cases. A mean over tasks or lengths: the "
        "intervals of its parts combined as of independent samples (MOVER), which says how sure the mean of these "
        "tasks is. The difference of means: a bootstrap over tasks, each with all its lengths and paired with the full "
        "cache, which says how much it depends on which tasks were chosen; with one task there is none."
    )


def _comparisons(lines: Sequence[dict]) -> str:
    p = known(e["p"] for e in lines if e["series"] not in CONTROLS)
    if not p:
        return ""
    below = sum(v < ALPHA for v in p)
    return (
        f"{len(p)} exact McNemar tests against the full cache: {below} have p < {ALPHA}, {holm(p)} still after Holm's "
        f"correction for testing them all. Marks in the tables (an interval of the difference that leaves 0 out) are "
        "not corrected: among many, about one in twenty comes by chance."
    )


def _few(lines: Sequence[dict]) -> str:
    if not lines:
        return ""
    least = min(e["cases"] for e in lines)
    return (
        f"A line has {least} cases or more. Where all {least} agree with the full cache, the bootstrap of the "
        f"difference has no width; one of up to {min(1.0, 3 / least):.2g} is still possible (rule of three)."
    )


def _unknown_zeros(results: dict) -> str:
    lines = results["lines"]
    return "" if not lines or any(e["series"] == ZEROS for e in lines) else " zeros was not run here."
