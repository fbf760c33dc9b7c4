"""The leaderboard as Markdown, and its place in a page of the documentation."""

from collections.abc import Sequence
from pathlib import Path

from kvshrink.data.text import read_text
from kvshrink.errors import EvalError
from kvshrink.eval.report import tables
from kvshrink.eval.report.notes import OF_FULL
from kvshrink.eval.report.results import budget, fidelity_groups, known, modes, read_file, silent, unique
from kvshrink.eval.report.standings import Standing, standings
from kvshrink.eval.run.entries import CONTROLS
from kvshrink.store import atomic

BEGIN = "<!-- leaderboard: written by `kvshrink report DIR --leaderboard FILE` -->"
END = "<!-- end of leaderboard -->"


def leaderboard(results: dict) -> str:
    """A heading and a table per mode and budget, the highest mean score first."""
    s = results["settings"]
    tasks = len(unique(e["task"] for e in results["lines"]))
    lengths = ", ".join(map(str, sorted(known(unique(e["length"] for e in results["lines"]))))) or "-"
    left = silent(results)
    parts = [
        f"Model `{s.get('model')}`, {tasks} tasks, lengths {lengths}, at least {s.get('cases')} cases a line. {OF_FULL}"
    ]
    if not results["lines"]:
        parts.append("No task was measured.")
    if left:
        parts.append(
            "Means are over tasks and lengths on which the full cache is above a cache of zeros; "
            f"{len(left)} (task, length, mode) are not, because the model cannot do them, and are listed in the report."
        )
    board = standings(results)
    for mode in modes(results):
        rows = [r for r in board if r.mode == mode]
        controls = [r for r in rows if r.series in CONTROLS]
        for target in unique(r.target for r in rows if r.series not in CONTROLS):
            own = [r for r in rows if r.target == target and r.series not in CONTROLS]
            parts += [f"### {budget(target)}, {mode}".capitalize(), _table(controls + own)]
        if not rows:
            parts.append(f"Mode {mode}: on no task is the full cache above a cache of zeros, so there is no mean.")
        elif len(controls) == len(rows):
            parts += [f"### Controls, {mode}", _table(controls)]
    parts += [_footnote(results), f"`{s.get('command')}`"]
    return "\n\n".join(parts) + "\n"


def overview(results: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(head, rows) of all standings as text, for a terminal."""
    rows = [(r.mode, *(_text(c) for c in tables.standing(r))) for r in standings(results)]
    return ("mode", *tables.LEADERBOARD), rows


def write_leaderboard(results: Path, page: Path) -> None:
    """Put the leaderboard of a results.json between the two marks in a page; the rest of the page stays."""
    made = leaderboard(read_file(results))
    text = read_text(page, "cannot read", EvalError)
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise EvalError(f"{page} does not have the two marks once each, in order. Put in these lines: {BEGIN} {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    whole = f"{before}{BEGIN}\n\n{made}\n{END}{after}"
    atomic.write_all({page: lambda part: part.write_text(whole, encoding="utf-8")})


def _table(rows: Sequence[Standing]) -> str:
    head = tables.LEADERBOARD
    lines = [head, ("---", *("---:" for _ in head[1:])), *(tuple(map(_cell, tables.standing(r))) for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell: tables.Cell) -> str:
    parts = [cell.text]
    if cell.interval:
        parts.append(f"[{cell.interval[0]}, {cell.interval[1]}]")
    if cell.note:
        parts.append(f"({cell.note})")
    return " ".join(parts)


def _cell(cell: tables.Cell) -> str:
    text = _text(cell)
    for raw, safe in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("\n", " "),
        ("*", "\\*"),
        ("_", "\\_"),
        ("`", "'"),
    ):
        text = text.replace(raw, safe)
    return text


def _footnote(results: dict) -> str:
    parts = [
        "Brackets: 95 % intervals; of the mean score those of its tasks combined, of the difference to the full cache "
        "a bootstrap over tasks."
    ]
    if groups := fidelity_groups(results):
        first = groups[0][0]
        parts.append(
            f"KL and top-1 agreement: {first['mode']}, {first['positions']} positions of {first['documents']} "
            f"documents, length {first['length']}."
        )
    parts.append("Time: per token, as a multiple of the full cache's in the same run.")
    if results["failures"]:
        parts.append(f"Failures: {len(results['failures'])}, listed in the report.")
    return " ".join(parts)
