"""The picture of singular values, and what all pictures need. matplotlib is in the `eval` extra."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvshrink.errors import EvalError
from kvshrink.store import atomic

KINDS = ("png", "svg", "pdf")


def spectra(layers: Mapping[int, tuple[np.ndarray, np.ndarray]], path: Path, title: str) -> None:
    """Singular values of keys and values per layer, relative to the largest (the paper's Figure 1)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True, layout="constrained")
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
    figure.suptitle(title, parse_math=False)
    save(figure, path)


def pyplot():
    """matplotlib.pyplot, drawing to files only. Raises EvalError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise EvalError("plots need matplotlib: pip install 'kvshrink[eval]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path) -> None:
    """Write a figure under exactly this name and let it go. Raises EvalError if it cannot be written."""
    try:
        kind = check_ending(path)
        with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
            atomic.write_all({path: lambda part: figure.savefig(part, dpi=130, format=kind)})
    finally:
        pyplot().close(figure)


def check_ending(path: Path) -> str:
    """The kind of picture that a name says. Raises EvalError if it says none: another name would be written."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise EvalError(f"cannot write picture {path}: its name has to end in {', '.join(f'.{k}' for k in KINDS)}.")
    return kind
