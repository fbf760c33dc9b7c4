"""Figures of ablations, in the style of the suite's: curves with intervals, and rows of dots."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvshrink.eval.report import plots
from kvshrink.eval.report.figures_cache import log_axis
from kvshrink.eval.report.style import INK, Style, styles
from kvshrink.eval.run.entries import FULL

KL = "KL from the full cache, nats a token"
KL_SHORT = "KL, nats a token"
LINES = "LongEval lines right"
PAPER = "paper, LongChat-7B"
MARGIN = 1.6


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None
    high: float | None = None


Curves = Mapping[str, Sequence[Point]]


def panels(count: int, width: float = 3.3, height: float = 3.0, **shared: Any) -> tuple[Any, list]:
    """(figure, axes) side by side."""
    figure, grid = plots.pyplot().subplots(
        1, count, figsize=(max(4.7, width * count), height), squeeze=False, layout="constrained", **shared
    )
    return figure, list(grid[0])


def looks(names: Sequence[str]) -> dict[str, Style]:
    return styles(list(names))


def lines_at(row: dict, x: float, kind: str = "lines") -> list[Point]:
    """A row's score as a point, or nothing."""
    got = row[kind]
    return [Point(x, got["score"], got["low"], got["high"])] if got else []


def long_at(row: dict, x: float) -> list[Point]:
    return lines_at(row, x, "long")


def kl_at(row: dict, x: float) -> list[Point]:
    got = row["kl"]
    return [Point(x, got["mean"], got["low"], got["high"])] if got else []


def curves(
    axis: Any,
    series: Curves,
    look: Mapping[str, Style],
    dashed: Sequence[str] = (),
    spread: float = 0.0,
    octaves: bool = False,
) -> dict:
    """A curve per series with intervals as bars, set apart sideways by `spread` (of an octave); {name: handle}."""
    handles = {}
    for i, (name, points) in enumerate(series.items()):
        if not points:
            continue
        style, aside = look[name], spread * (i - (len(series) - 1) / 2)
        at = [p.x * 2**aside if octaves else p.x + aside for p in points]
        bars = [(x, p.low, p.high) for x, p in zip(at, points, strict=True) if p.low is not None and p.high is not None]
        if bars:
            axis.vlines(*zip(*bars, strict=True), color=style.colour, alpha=0.35, lw=1)
        faint = {"ls": "--", "mfc": plots.pyplot().rcParams["figure.facecolor"]} if name in dashed else {"ls": "-"}
        (handles[name],) = axis.plot(at, [p.y for p in points], color=style.colour, marker=style.mark, **faint)
    return handles


def dashed_key(axis: Any, name: str) -> dict:
    """A handle that says what hollow marks on dashed curves are."""
    hollow = plots.pyplot().rcParams["figure.facecolor"]
    (line,) = axis.plot([], [], color=INK, ls="--", marker="o", mfc=hollow)
    return {name: line}


def paper(axis: Any, points: Sequence[tuple[float, float]]) -> dict:
    """The paper's own curve, in ink."""
    (line,) = axis.plot(*zip(*points, strict=True), color=INK, ls=":", marker=".", alpha=0.6, lw=1)
    return {PAPER: line}


def full_line(axis: Any, row: dict | None) -> dict:
    """The full cache's score across an axis of scores."""
    if not row or not row["lines"]:
        return {}
    return {"full cache": axis.axhline(row["lines"]["score"], color=INK, ls=looks([])[FULL].dash, lw=1)}


def scores_axis(axis: Any) -> None:
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(LINES)


def kl_axis(axis: Any) -> None:
    """The last thing done to an axis of KL: its limits follow from the points, as intervals may go down to 0."""
    logs(axis, "y", [y for line in axis.lines for y in line.get_ydata()])
    axis.set_ylabel(KL)


def logs(axis: Any, side: str, values: Sequence[float]) -> None:
    """A log axis around these values, with plain numbers."""
    getattr(axis, f"set_{side}scale")("log")
    if known := [v for v in values if v > 0]:
        getattr(axis, f"set_{side}lim")(min(known) / MARGIN, max(known) * MARGIN)
    log_axis(axis, side)


def dots(axis: Any, labels: Sequence[str], series: Curves, look: Mapping[str, Style]) -> dict:
    """Rows of dots: a point's x is its value, its y the number of its label, first on top."""
    handles = {}
    for i, (name, points) in enumerate(series.items()):
        if not points:
            continue
        aside, style = 0.18 * (i - (len(series) - 1) / 2), look[name]
        bars = [(p.y + aside, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if bars:
            axis.hlines(*zip(*bars, strict=True), color=style.colour, alpha=0.4, lw=1)
        ys = [p.y + aside for p in points]
        (handles[name],) = axis.plot([p.x for p in points], ys, color=style.colour, marker=style.mark, ls="")
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    return handles


def legend(figure: Any, handles: Mapping) -> None:
    """One legend above all panels."""
    if handles:
        wide = figure.get_size_inches()[0]
        columns = max(1, int(wide / (0.068 * max(map(len, handles)) + 0.5)))
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=min(columns, len(handles))
        )
