"""Figures of scores: mean and per task against bytes, against length, and depth by length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvshrink.eval.report import plots
from kvshrink.eval.report.results import budget, of, reached, targets, telling, unique
from kvshrink.eval.report.standings import Mean, Standing, pooled
from kvshrink.eval.report.style import Style
from kvshrink.eval.run.entries import CONTROLS, FULL, ZEROS

SHORT = {"0.00": "0", "1.00": "1"}
RAMP = ("#F0496E", "#EBB839", "#0CD79F")
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
COLUMNS = 4
DEPTHS = 11  # rows of a heatmap
BYTES = "bytes, % of the full cache"
NAMES = {FULL: "full cache", ZEROS: "context zeroed"}
Styles = Mapping[str, Style]


def mean(rows: Sequence[Standing], styles: Styles) -> Any:
    """Mean score over tasks of one mode against measured bytes; the full cache and the zeroed context are lines."""
    if not rows:
        return None
    figure, axis = plots.pyplot().subplots(figsize=(4.7, 3.5), layout="constrained")
    points = [(s.series, s.reached, s.mean) for s in rows]
    handles = _panel(axis, points, styles)
    byte_axis(axis, [p.byte_ratio for name, _, p in points if p.byte_ratio and name not in CONTROLS])
    axis.set_xlabel(BYTES)
    axis.set_ylabel("mean score over tasks")
    legend(figure, handles)
    return figure


def accuracy(results: dict, styles: Styles, mode: str) -> Any:
    """Score with its interval against measured bytes: one panel per task, and the mean over all of them."""
    lines = of(results["lines"], mode=mode)
    tasks = unique(e["task"] for e in lines)
    if not tasks:
        return None
    means = unique(e["task"] for e in telling(results, mode))
    panels = {"mean over tasks": means} if len(means) > 1 else {}
    panels |= {task: [task] for task in tasks}
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(4.7, 2.6 * columns), 1.85 * rows + 0.6)
    figure, grid = plots.pyplot().subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    handles: dict = {}
    drawn = []
    for axis, (title, names) in zip(grid.flat, panels.items(), strict=False):
        points = _points(telling(results, mode) if len(names) > 1 else lines, names)
        drawn += [p.byte_ratio for name, _, p in points if p.byte_ratio and name not in CONTROLS]
        handles |= _panel(axis, points, styles)
        axis.set_title(title, loc="left", fontweight="bold" if len(names) > 1 else "normal")
    byte_axis(grid[0][0], drawn)
    _hide_free(grid, len(panels))
    figure.supxlabel(BYTES, fontsize=8.5)
    figure.supylabel("score", fontsize=8.5)
    legend(figure, handles)
    return figure


def length(results: dict, styles: Styles, mode: str) -> Any:
    """Mean score against length, one panel per budget, over the tasks that have every length."""
    lines = [e for e in telling(results, mode) if e["length"] is not None]
    asked = results["settings"].get("lengths") or []  # not those of tasks that have a length of their own
    lengths = sorted(n for n in unique(e["length"] for e in lines) if n in asked)
    everywhere = [t for t in unique(e["task"] for e in lines) if {e["length"] for e in of(lines, task=t)} >= {*lengths}]
    lines = [e for e in lines if e["task"] in everywhere and e["length"] in lengths]
    if len(lengths) < 2 or not lines:
        return None
    budgets = targets(lines) or [None]
    plt = plots.pyplot()
    figure, grid = plt.subplots(
        1, len(budgets), figsize=(max(4.7, 3.4 * len(budgets)), 3.1), squeeze=False, sharey=True, layout="constrained"
    )
    handles: dict = {}
    for axis, target in zip(grid.flat, budgets, strict=True):
        for name in unique(e["series"] for e in lines):
            own = [e for e in of(lines, series=name) if e["target"] == target or name in CONTROLS]
            points = [(n, pooled([of(own, task=t, length=n) for t in everywhere])) for n in lengths]
            found = [(n, p) for n, p in points if p is not None]
            if found:
                means = [p for _, p in found]
                handles[name] = _curve(axis, [n for n, _ in found], means, styles[name], interval=name not in CONTROLS)
        axis.set_title(budget(target), loc="left")
        axis.set_xticks(lengths, [short(n) for n in lengths])
        axis.set_xlabel("length, tokens")
    grid[0][0].set_ylim(-0.03, 1.03)
    grid[0][0].set_ylabel(f"mean score over {len(everywhere)} tasks")
    legend(figure, handles)
    return figure


def heatmap(results: dict, mode: str, tasks: Sequence[str]) -> Any:
    """Score by depth and length: a row of panels per method, a panel per budget, red 0, yellow .5, green 1."""
    cells = [e for e in of(results["grid"], mode=mode) if e["task"] in tasks]
    controls = [[c for c in CONTROLS if of(cells, series=c)]]
    others = [of(cells, series=s) for s in unique(e["series"] for e in cells) if s not in CONTROLS]
    panels = [row for row in [*controls, *(unique(e["method"] for e in own) for own in others)] if row]
    if not panels:
        return None
    lengths, depths = sorted(unique(e["length"] for e in cells)), sorted(unique(map(_depth(cells), cells)))
    columns = max(map(len, panels))
    size = (max(4.7, 3.1 * columns), (0.19 * len(depths) + 0.6) * len(panels) + 0.3)
    figure, grid = plots.pyplot().subplots(
        len(panels), columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axes, names in zip(grid, panels, strict=True):
        for axis, name in zip(axes, names, strict=False):
            _cells(axis, _means([e for e in cells if e["method"] == name], _depth(cells)), depths, lengths)
            axis.set_title(NAMES.get(name, name), loc="left")
        for axis in axes[len(names) :]:
            axis.axis("off")
    grid[0][0].invert_yaxis()
    figure.supxlabel("length, tokens", fontsize=8.5)
    figure.supylabel("depth of what is asked", fontsize=8.5)
    return figure


def _cells(axis, means: Mapping, depths: Sequence[float], lengths: Sequence[int]) -> None:
    """One panel: colours, and the numbers on them, as colours alone do not reach every reader."""
    from matplotlib.colors import LinearSegmentedColormap

    values = [[means.get((d, n), float("nan")) for n in lengths] for d in depths]
    axis.pcolormesh(values, cmap=LinearSegmentedColormap.from_list("niah", RAMP), vmin=0, vmax=1)
    for y, d in enumerate(depths):
        for x, n in enumerate(lengths):
            if (d, n) in means:
                text = f"{means[d, n]:.2f}"
                axis.text(x + 0.5, y + 0.5, SHORT.get(text, text[1:]), ha="center", va="center", color="k", fontsize=7)
    axis.set_xticks([x + 0.5 for x in range(len(lengths))], [short(n) for n in lengths])
    axis.set_yticks([y + 0.5 for y in range(len(depths))], [f"{100 * d:.3g} %" for d in depths])
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)


def _depth(cells: Sequence[dict]) -> Callable[[dict], float]:
    """The row of a cell: its depth, or the nearest eighth where every sample has its own."""
    few = len({e["depth"] for e in cells}) <= DEPTHS
    return lambda e: e["depth"] if few else round(8 * e["depth"]) / 8


def _means(cells: Sequence[dict], depth: Callable[[dict], float]) -> dict[tuple[float, int], float]:
    """{(depth, length): mean over tasks of the means over samples}"""
    groups: dict = {}
    for e in cells:
        if e["score"] is not None:
            groups.setdefault((depth(e), e["length"]), {}).setdefault(e["task"], []).append(e)
    return {at: sum(map(_weighted, tasks.values())) / len(tasks) for at, tasks in groups.items()}


def _weighted(cells: Sequence[dict]) -> float:
    return sum(e["score"] * e["cases"] for e in cells) / sum(e["cases"] for e in cells)


def byte_axis(axis, ratios: Sequence[float]) -> None:
    """A log axis of bytes in percent of the full cache's, with plain numbers."""
    low, high = 100 * min(ratios, default=0.01) / 1.35, 100 * max(ratios, default=1) * 1.35
    ticks = [t for t in TICKS if low <= t <= high]
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)


def legend(figure, handles: Mapping) -> None:
    """One legend above all panels, controls last."""
    order = sorted(handles, key=lambda name: name in CONTROLS)
    if order:
        names = [NAMES.get(name, name) for name in order]
        wide = figure.get_size_inches()[0]
        # in inches: a letter, then the mark and the gap
        columns = max(1, int(wide / (0.068 * max(map(len, names)) + 0.5)))
        figure.legend([handles[n] for n in order], names, loc="outside upper center", ncols=min(columns, len(names)))


def short(tokens: float) -> str:
    """4000 -> "4k"; powers of two by 1024: 4096 -> "4k" too, as they are spoken."""
    thousand = 1024 if tokens % 1024 == 0 else 1000
    return f"{tokens / thousand:.3g}k" if tokens >= 1000 else f"{tokens:g}"


def _points(lines: list[dict], tasks: Sequence[str]) -> list[tuple[str, bool, Mean]]:
    """(series, whether it reached its budget, mean over the tasks) of every method."""
    points = []
    for method in unique(e["method"] for e in lines):
        own = [e for e in of(lines, method=method) if e["task"] in tasks]
        mean = pooled([of(own, task=t) for t in unique(e["task"] for e in own)])
        if mean is not None:
            points.append((own[0]["series"], reached(own), mean))
    return points


def _panel(axis, points: Sequence[tuple[str, bool, Mean]], styles: Styles) -> dict:
    """Score against % of full bytes; a handle per series. Controls are lines, a missed budget is a hollow mark."""
    handles = {}
    for name in unique(s for s, _, _ in points):
        own = [(there, p) for s, there, p in points if s == name]
        if name in CONTROLS:
            handles[name] = axis.axhline(own[0][1].score, color=styles[name].colour, ls=styles[name].dash, lw=1)
            continue
        placed = sorted([(100 * p.byte_ratio, r, p) for r, p in own if p.byte_ratio], key=lambda point: point[0])
        handles[name] = _curve(axis, [x for x, _, _ in placed], [p for _, _, p in placed], styles[name])
        for x, there, p in placed:
            if not there:
                hollow(axis, x, p.score, styles[name])
    axis.set_ylim(-0.03, 1.03)
    return handles


def hollow(axis, x: float, y: float, style: Style) -> None:
    """Mark a point whose method could not go down to its budget."""
    paper = plots.pyplot().rcParams["figure.facecolor"]
    axis.plot([x], [y], marker=style.mark, color=style.colour, mfc=paper, zorder=4)


def _curve(axis, at: Sequence[float], means: Sequence[Mean], style: Style, interval: bool = True) -> Any:
    scores = [p.score for p in means]
    bars = [(x, p) for x, p in zip(at, means, strict=True) if p.low is not None and p.high is not None]
    if interval and bars:
        axis.vlines(
            [x for x, _ in bars], [p.low for _, p in bars], [p.high for _, p in bars], color=style.colour, alpha=0.45
        )
    (line,) = axis.plot(at, scores, color=style.colour, marker=style.mark, ls=style.dash, zorder=3)
    return line


def _hide_free(grid, used: int) -> None:
    """Panels without a use vanish; those above them keep the numbers of their axes."""
    flat = list(grid.flat)
    for i in range(used, len(flat)):
        flat[i].axis("off")
        above = i - grid.shape[1]
        if above >= 0:
            flat[above].tick_params(labelbottom=True)
