"""Sentences that follow from numbers: whether a finding of the paper holds here."""

from collections.abc import Iterable, Sequence

from kvshrink.eval.ablations.rows import Verdict, number

PAPER = "LongChat-7B, LongEval"


def claim(paper: str, found: Verdict, wanted: int = 1) -> str:
    """The paper's finding, and whether the sign found is the wanted one."""
    return f"**{_word(found.sign, wanted)}.** The paper: {paper} Here: {found.how or 'not measured'}."


def tally(paper: str, found: Sequence[tuple[str, Verdict]], wanted: int = 1) -> str:
    """As `claim`, for one comparison at several places ("50 %", ...), which are listed by how they came out."""
    if not found:
        return f"**Not measured.** The paper: {paper}"
    signs = {wanted: "so", -wanted: "the other way round", 0: "undecided"}
    parts = [
        f"{text} at {listed(place for place, v in found if v.sign == sign)}"
        for sign, text in signs.items()
        if any(v.sign == sign for _, v in found)
    ]
    there = {v.sign for _, v in found} - {0}
    word = _word(there.pop() if len(there) == 1 else 0, wanted) if len(there) < 2 else "Mixed"
    detail = "; ".join(f"{place}: {v.how}" for place, v in found)
    return f"**{word}.** The paper: {paper} Here {', '.join(parts)} ({detail})."


def near(paper: str, ok: bool | None, here: str) -> str:
    """A finding that a figure is near another one; ok None: it cannot be said."""
    return f"**{'Not decided' if ok is None else 'Agrees' if ok else 'Differs'}.** The paper: {paper} Here: {here}."


def listed(items: Iterable[str]) -> str:
    """a, b and c"""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def scored(row: dict) -> str:
    """A row's score on lines with its interval, and its KL."""
    parts = []
    if lines := row["lines"]:
        span = f"{number(lines['low'])}-{number(lines['high'])}"
        parts.append(f"{number(lines['score'])} [{span}] of {lines['cases']} answers")
    if row["kl"]:
        parts.append(f"KL {row['kl']['mean']:.3g}")
    return ", ".join(parts) or "nothing measured"


def _word(sign: int, wanted: int) -> str:
    return "Agrees" if sign == wanted else "Not decided" if sign == 0 else "Differs"
