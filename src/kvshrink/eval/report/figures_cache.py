"""Figures of the cache: KL against bytes and by distance, bytes against context, error per layer."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from kvshrink.eval.report import plots
from kvshrink.eval.report.figures import BYTES, byte_axis, hollow, legend, short
from kvshrink.eval.report.results import budget, of, targets, unique
from kvshrink.eval.report.style import INK, Style
from kvshrink.eval.run.entries import CONTROLS, FULL

FLOOR = 1e-6  # a log axis has no zero
ERRORS = {
    "key_error": "keys, before RoPE",
    "key_rope_error": "keys, after RoPE",
    "value_error": "values",
    "output_error": "attention output",
}
Styles = Mapping[str, Style]


def divergence(group: Sequence[dict], styles: Styles, missed: Set[str]) -> Any:
    """Mean KL from the full cache, with its interval, against measured bytes, both on log axes; grey: Pareto front."""
    rows = [e for e in group if e["kl_mean"] is not None and e["byte_ratio"] and e["series"] not in CONTROLS]
    if not rows:
        return None
    figure, axis = plots.pyplot().subplots(figsize=(4.7, 3.5), layout="constrained")
    front = pareto([(100 * e["byte_ratio"], max(FLOOR, e["kl_mean"])) for e in rows])
    axis.plot(*zip(*front, strict=True), color=INK, alpha=0.12, lw=7, solid_capstyle="round", zorder=1)
    handles = {}
    for name in unique(e["series"] for e in rows):
        own, style = sorted(of(rows, series=name), key=lambda e: e["byte_ratio"]), styles[name]
        at = [100 * e["byte_ratio"] for e in own]
        bars = [(x, e) for x, e in zip(at, own, strict=True) if e["kl_low"] is not None and e["kl_high"] is not None]
        low, high = ([max(FLOOR, e[k]) for _, e in bars] for k in ("kl_low", "kl_high"))
        axis.vlines([x for x, _ in bars], low, high, color=style.colour, alpha=0.45)
        means = [max(FLOOR, e["kl_mean"]) for e in own]
        (handles[name],) = axis.plot(at, means, color=style.colour, marker=style.mark, zorder=3)
        for x, y, e in zip(at, means, own, strict=True):
            if e["method"] in missed:
                hollow(axis, x, y, style)
    log_axis(axis)
    byte_axis(axis, [e["byte_ratio"] for e in rows])
    axis.set_xlabel(BYTES)
    axis.set_ylabel("KL from the full cache, nats per token")
    legend(figure, handles)
    return figure


def pareto(points: Sequence[tuple[float, float]], slack: float = 0.03) -> list[tuple[float, float]]:
    """The points (bytes, loss) that no other one beats, by bytes. Budgets are met to some percent: a point of up to
    `slack` more bytes counts as one of the same bytes."""
    best = [p for p in points if not any(q[1] < p[1] and q[0] <= p[0] * (1 + slack) for q in points)]
    return sorted(best)


def distance(group: Sequence[dict], styles: Styles) -> Any:
    """Mean KL against the distance from the end of the compressed prefix, one panel per budget."""
    rows = [e for e in group if e["by_distance"] and e["series"] not in CONTROLS]
    figure, panels = _per_budget(rows)
    handles = {}
    for axis, target in panels:
        for e in of(rows, target=target):
            style = styles[e["series"]]
            curve = [(p["upto"], max(FLOOR, p["kl"])) for p in e["by_distance"] if p["kl"] is not None]
            if curve:
                (line,) = axis.plot(*zip(*curve, strict=True), color=style.colour, marker=style.mark, ms=3.5)
                handles[e["series"]] = line
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        log_axis(axis)
        axis.set_xlabel("tokens after the prefix, up to")
    if figure is not None:
        panels[0][0].set_ylabel("mean KL, nats per token")
        legend(figure, handles)
    return figure


def memory(results: dict, styles: Styles) -> Any:
    """Bytes held (solid) and with the temporaries of one decode step on top (dashed) against context length."""
    rows = [e for e in results["memory"] if e["held"] is not None and e["length"] is not None]
    figure, panels = _per_budget(rows)
    handles = {}
    for axis, target in panels:
        for name in unique(e["series"] for e in rows):
            own = [e for e in of(rows, series=name) if name == FULL or (e["target"] == target and name not in CONTROLS)]
            own = sorted(own, key=lambda e: e["length"])
            if not own:
                continue
            style = styles[name]
            look = {"color": style.colour, "marker": style.mark, "ms": 4}
            (handles[name],) = axis.plot([e["length"] for e in own], [e["held"] for e in own], **look)
            peaks = [(e["length"], e["held"] + e["peak"]) for e in own if e["peak"] is not None]
            axis.plot([n for n, _ in peaks], [b for _, b in peaks], **(look | {"marker": ""}), ls=(0, (3, 2)))
        lengths = sorted(unique(e["length"] for e in rows))
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [short(n) for n in lengths])
        axis.set_xticks([], minor=True)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda b, _: human(b))
        axis.set_xlabel("context, tokens")
    if figure is not None:
        panels[0][0].set_ylabel("bytes")
        legend(figure, handles)
    return figure


def layers(results: dict, styles: Styles) -> Any:
    """Relative error of keys, values and attention output per layer, longest context: a row per budget."""
    rows = [e for e in results["layers"] if e["series"] not in CONTROLS]
    kinds = [k for k in ERRORS if any(e[k] is not None for e in rows)]
    if not kinds:
        return None
    longest = max((e["length"] or 0) for e in rows)
    rows = [e for e in rows if (e["length"] or 0) == longest]
    budgets = targets(rows)
    figure, grid = plots.pyplot().subplots(
        len(budgets),
        len(kinds),
        figsize=(2.6 * len(kinds), 2.0 * len(budgets) + 0.5),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    handles = {}
    for line, target in zip(grid, budgets, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            for name in unique(e["series"] for e in rows):
                own = sorted(of(rows, series=name, target=target), key=lambda e: e["layer"])
                known = [(e["layer"], max(FLOOR, e[kind])) for e in own if e[kind] is not None]
                if known:
                    look = {"color": styles[name].colour, "marker": styles[name].mark, "ms": 4}
                    (handles[name],) = axis.plot(*zip(*known, strict=True), **look)
            axis.xaxis.get_major_locator().set_params(integer=True)
        line[0].set_ylabel(budget(target))
    for axis, kind in zip(grid[0], kinds, strict=True):
        axis.set_title(ERRORS[kind], loc="left")
    log_axis(grid[0][0])
    figure.supxlabel("layer", fontsize=8.5)
    legend(figure, handles)
    return figure


def human(count: float) -> str:
    """1536 -> "1.5 KiB", as short as an axis wants it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _per_budget(rows: Sequence[dict]) -> tuple[Any, list]:
    """(figure, [(axis, budget)]) with a panel per budget, (None, []) if there is none."""
    budgets = targets(rows)
    if not budgets:
        return None, []
    wide = max(4.7, 3.4 * len(budgets))
    figure, grid = plots.pyplot().subplots(
        1, len(budgets), figsize=(wide, 3.1), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, target in zip(grid[0], budgets, strict=True):
        axis.set_title(budget(target), loc="left")
    return figure, list(zip(grid[0], budgets, strict=True))


def log_axis(axis, side: str = "y") -> None:
    """A log axis with plain numbers, few enough for its limits."""
    getattr(axis, f"set_{side}scale")("log")
    low, high = getattr(axis, f"get_{side}lim")()
    own = getattr(axis, f"{side}axis")
    own.get_major_locator().set_params(subs=(1,) if high > 500 * low else (1, 3) if high > 20 * low else (1, 2, 5))
    own.set_major_formatter(lambda y, _: f"{y:g}")
    own.set_minor_formatter(lambda y, _: "")
