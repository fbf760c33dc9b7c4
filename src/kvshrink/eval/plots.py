"""Pictures: accuracy against kept bytes, and singular-value spectra. matplotlib is in the `eval` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvshrink.errors import EvalError
from kvshrink.eval.summary import Line

COLOURS = {"full": "#222222", "cskv": "#0072b2", "rtn": "#d55e00", "streaming_llm": "#009e73"}
MARKS = {"full": "*", "cskv": "o", "rtn": "s", "streaming_llm": "^"}


def accuracy(lines: Sequence[Line], path: Path) -> None:
    """Accuracy with its 95 % interval against kept bytes (log axis), one panel per task."""
    plt = _pyplot()
    names = list(dict.fromkeys(line.task for line in lines))
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names) + 1.2, 4.2), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        for line in (x for x in lines if x.task == name):
            family = line.method.split()[0]
            below, above = line.accuracy - line.low, line.high - line.accuracy
            axis.errorbar(
                100 * line.kept,
                line.accuracy,
                yerr=[[max(0.0, below)], [max(0.0, above)]],
                fmt=MARKS.get(family, "D"),
                color=COLOURS.get(family, "#888888"),
                mfc="white" if "bits=" in line.method and family == "cskv" else None,
                capsize=2,
                label=family,
            )
        axis.set_xscale("log")
        axis.set_xlabel("bytes kept, % of the full cache (measured)")
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes[0][0].set_ylabel("accuracy")
    axes[0][0].set_ylim(-0.03, 1.05)
    known: dict = {}
    for axis in axes[0]:
        known |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axes[0][0].legend(known.values(), known.keys(), loc="lower right", fontsize=8)
    _save(figure, path, plt)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
