"""The report of a suite: one HTML page that loads nothing, its figures beside it, and a Markdown leaderboard.

All of it is made from results.json alone, so it can be made again at any time and comes out the same.
"""

from collections.abc import Sequence
from pathlib import Path

from kvshrink.eval.report import figures, plots
from kvshrink.eval.report.markdown import leaderboard, overview, write_leaderboard
from kvshrink.eval.report.page import check_installed, drawn, page
from kvshrink.eval.report.results import read, silent, unique
from kvshrink.eval.report.standings import standings
from kvshrink.eval.report.style import RC, styles
from kvshrink.eval.report.summary import Line
from kvshrink.store import atomic, files

__all__ = ["accuracy", "build", "check_installed", "leaderboard", "overview", "silent", "write_leaderboard"]


def build(folder: Path) -> Path:
    """Write report.html, leaderboard.md and the figures into a suite's folder: all of them or none. The page's path.

    Raises EvalError if the folder holds no results.
    """
    folder = Path(folder)
    results = read(folder)
    board = standings(results)
    found = drawn(results, board)
    contents = {"report.html": page(results, board, found).encode(), "leaderboard.md": leaderboard(results).encode()}
    for figure in (drawing for place in found.values() for drawing in place):
        contents |= {f"{figure.name}.svg": figure.picture.svg, f"{figure.name}.png": figure.picture.png}
    atomic.write_all({folder / name: _put(data) for name, data in contents.items()})
    return folder / "report.html"


def accuracy(lines: Sequence[Line], mode: str, path: Path) -> None:
    """Score with its interval against its bytes, one panel per task: a picture of some lines without a report."""
    data = {"lines": [line.to_dict() for line in lines]}
    with plots.pyplot().rc_context(RC):
        plots.save(figures.accuracy(data, styles(unique(e["series"] for e in data["lines"])), mode), path)


def _put(data: bytes) -> files.Put:
    return lambda part: part.write_bytes(data)
