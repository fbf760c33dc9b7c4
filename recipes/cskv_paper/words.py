"""Sentences that follow from numbers: whether a finding of the paper holds here."""

from collections.abc import Iterable, Sequence

from recipes.cskv_paper.rows import Verdict, number

Placed = Sequence[tuple[str, Verdict]]  # one comparison at several places: "50 %", ...


def claim(paper: str, found: Verdict, wanted: int = 1) -> str:
    """The paper's finding, and whether the sign found is the wanted one."""
    return f"**{_word(found, wanted)}.** The paper: {paper} Here: {found.how or 'not measured'}."


def tally(paper: str, found: Placed, wanted: int = 1) -> str:
    """As `claim`, at several places, which are listed by how they came out."""
    if not found:
        return f"**Not measured.** The paper: {paper}"
    decided = [v for _, v in found if v.sign]
    if {v.sign for v in decided} == {1, -1}:
        word = "Mixed"
    else:
        # by answers if any is
        word = _word(min(decided, key=lambda v: v.by, default=Verdict(0, "")), wanted)
    return f"**{word}.** The paper: {paper} Here {sorted_out(found, wanted, SO)}."


def beside(what: str, found: Placed) -> str:
    """A comparison that the paper does not have."""
    return f"Not in the paper: {what} is {sorted_out(found, 1, BETTER)}." if found else ""


def sorted_out(found: Placed, wanted: int, names: dict[int, str]) -> str:
    """The places by outcome, with the numbers of those that are decided."""
    parts = []
    for sign in (wanted, -wanted, 0):
        own = [(place, v) for place, v in found if v.sign == sign]
        if own:
            numbers = "; ".join(f"{place}: {v.how}" for place, v in own) if sign else ""
            name = names[sign * wanted]
            parts.append(f"{name} at {listed(p for p, _ in own)}" + (f" ({numbers})" if numbers else ""))
    return ", ".join(parts)


def near(paper: str, ok: bool | None, here: str) -> str:
    """A finding that a figure is near another one; ok None: it cannot be said."""
    return f"**{'Not decided' if ok is None else 'Agrees' if ok else 'Differs'}.** The paper: {paper} Here: {here}."


def listed(items: Iterable[str]) -> str:
    """a, b and c"""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def scored(row: dict, kind: str = "lines") -> str:
    """A row's score with its interval, and its KL."""
    parts = []
    if got := row[kind]:
        span = f"{number(got['low'])}-{number(got['high'])}"
        parts.append(f"{number(got['score'])} [{span}] of {got['cases']} answers")
    if row["kl"]:
        parts.append(f"KL {row['kl']['mean']:.3g}")
    return ", ".join(parts) or "nothing measured"


SO = {1: "so", -1: "the other way round", 0: "undecided"}
BETTER = {1: "better", -1: "worse", 0: "not to be told apart"}


def _word(found: Verdict, wanted: int) -> str:
    if found.sign == 0:
        return "Not decided"
    return ("Agrees" if found.sign == wanted else "Differs") + (", by the KL" if found.by == "KL" else "")
