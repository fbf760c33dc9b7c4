"""The picture of a search: KL over bytes, every setting a point, the front a line, the chosen plan a ring."""

from collections.abc import Sequence
from pathlib import Path

from kvshrink.eval.report import plots
from kvshrink.eval.report.style import styles
from kvshrink.plan.bench import Point

LEAST = 1e-6  # nats: a KL of 0 has no place on a logarithmic axis


def picture(points: Sequence[Point], front: Sequence[Point], chosen: Point, path: Path, title: str) -> None:
    """Draw to a file."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    names = list(dict.fromkeys(p.name for p in points))
    for name, style in styles(names).items():
        own = [p for p in points if p.name == name]
        if own:
            where = [100 * p.byte_ratio for p in own], [max(p.kl, LEAST) for p in own]
            axis.scatter(*where, s=22, color=style.colour, marker=style.mark, label=name, alpha=0.8)
    axis.plot([100 * p.byte_ratio for p in front], [max(p.kl, LEAST) for p in front], color="grey", lw=1, zorder=0)
    axis.scatter([100 * chosen.byte_ratio], [max(chosen.kl, LEAST)], s=160, facecolors="none", edgecolors="black")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("bytes held, % of the full cache's")
    axis.set_ylabel("KL on held-out text, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10, parse_math=False)
    plots.save(figure, path)
