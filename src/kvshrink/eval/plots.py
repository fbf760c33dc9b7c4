"""Pictures: accuracy against kept bytes, and singular-value spectra. matplotlib is in the `eval` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvshrink.errors import EvalError
from kvshrink.eval.summary import Line

# label, colour, mark and fill of a method in the plot of accuracy, by the first rule that fits its name
STYLES = (
    ("full", "full cache", "#222222", "*", True),
    ("streaming_llm", "StreamingLLM", "#009e73", "^", True),
    ("rtn", "plain int", "#d55e00", "s", True),
    ("key_share=auto", "CSKV, 4 bits, key_share auto", "#56b4e9", "D", False),
    ("bits=", "CSKV, few bits", "#0072b2", "o", False),
    ("cskv", "CSKV, 16 bits", "#0072b2", "o", True),
    ("", "other", "#888888", "x", True),
)
COLUMNS = 3


def accuracy(lines: Sequence[Line], path: Path) -> None:
    """Accuracy with its 95 % interval against kept bytes (log axis), one panel per task."""
    plt = _pyplot()
    names = list(dict.fromkeys(line.task for line in lines))
    # one panel is left free for the legend
    rows, columns = -(-(len(names) + 1) // COLUMNS), min(COLUMNS, len(names) + 1)
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.7 * rows), squeeze=False, sharey=True)
    panels = list(grid.flat)
    handles: dict = {}
    for axis, name in zip(panels, names, strict=False):
        handles |= _panel(axis, [line for line in lines if line.task == name])
        axis.set_title(name, fontsize=10)
    for axis in panels[len(names) :]:
        axis.axis("off")
    for row in grid:
        row[0].set_ylabel("accuracy")
    panels[0].set_ylim(-0.03, 1.05)
    panels[len(names)].legend(handles.values(), handles.keys(), loc="center", frameon=False)
    _save(figure, path, plt)


def _panel(axis, lines: Sequence[Line]) -> dict:
    """One task; returns a handle per label."""
    handles: dict = {}
    for key, label, colour, mark, filled in STYLES:
        known = [line for line in lines if key in line.method and _style(line)[1] == label]
        points = sorted(known, key=lambda line: line.kept)
        if not points:
            continue
        kept = [100 * p.kept for p in points]
        below = [max(0.0, p.accuracy - p.low) for p in points]
        above = [max(0.0, p.high - p.accuracy) for p in points]
        axis.errorbar(kept, [p.accuracy for p in points], yerr=[below, above], fmt="none", ecolor=colour, alpha=0.3)
        style = {"color": colour, "marker": mark, "ms": 6, "lw": 1, "mfc": colour if filled else "white"}
        (handles[label],) = axis.plot(kept, [p.accuracy for p in points], **style)
    axis.set_xscale("log")
    axis.set_xlim(5, 120)
    axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axis.set_xlabel("bytes kept, % of the full cache (measured)", fontsize=9)
    axis.grid(alpha=0.3)
    return handles


def _style(line: Line) -> tuple:
    return next(style for style in STYLES if style[0] in line.method)


def spectra(layers: Mapping[int, tuple[np.ndarray, np.ndarray]], path: Path, title: str) -> None:
    """Singular values of keys and values per layer, relative to the largest (the paper's Figure 1)."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, max(2, len(layers))))
    for colour, (index, pair) in zip(colours, layers.items(), strict=False):
        for axis, values in zip(axes, pair, strict=True):
            channels = 100 * np.arange(1, len(values) + 1) / len(values)
            axis.plot(channels, values / max(values[0], 1e-12), color=colour, label=f"layer {index}", lw=1.2)
    for axis, name in zip(axes, ("keys", "values"), strict=True):
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("channel, % of the KV width")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("singular value / largest")
    if len(layers) <= 12:
        axes[1].legend(fontsize=7)
    figure.suptitle(title)
    _save(figure, path, plt)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise EvalError("plots need matplotlib: pip install 'kvshrink[eval]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path, plt) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise EvalError(f"cannot write picture {path}: {str(error).splitlines()[0]}. Use .png or .svg.") from error
    finally:
        plt.close(figure)
