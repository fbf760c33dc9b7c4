"""The picture of bench/equal_bytes.py: answers and KL against bytes really held."""

from pathlib import Path

from kvshrink.eval.report.plots import pyplot, save

SHOWN = ("spectral", "CSKV pca int4", "CSKV paper int4", "KIVI", "int4", "int3", "int2", "StreamingLLM")


def draw(found: dict, path: Path) -> None:
    """Rows: length; columns: share of right answers, KL over question and answer, KL over held-out text."""
    plt = pyplot()
    lengths = sorted({r["length"] for r in found["rows"]})
    size = (13.5, 4.2 * len(lengths))
    figure, axes = plt.subplots(len(lengths), 3, figsize=size, sharey="col", layout="constrained", squeeze=False)
    for line, length in zip(axes, lengths, strict=True):
        rows = [r for r in found["rows"] if r["length"] == length]
        full = next(r for r in rows if r["series"] == "full")
        line[0].axhline(full["score"], color="0.5", lw=1, ls=":", label="full cache")
        for label in SHOWN:
            _series(line, label, sorted((r for r in rows if r["series"] == label), key=lambda r: r["byte_ratio"]))
        titles = ("right answers, mean of four tasks", "KL, question and answer (nats)", "KL, held-out text (nats)")
        for axis, title in zip(line, titles, strict=True):
            axis.set_title(title if len(lengths) == 1 else f"{title}, {length} tokens", fontsize=10)
            axis.set_xscale("log")
            axis.set_xticks([4, 6.25, 12.5, 20, 30], ["4", "6.25", "12.5", "20", "30"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel("bytes held, % of the full cache's")
        line[1].set_yscale("log")
        line[2].set_yscale("log")
    axes[0, 0].legend(fontsize=7)
    save(figure, path)


def _series(axes, label: str, rows: list[dict]) -> None:
    x = [100 * r["byte_ratio"] for r in rows]
    heights = ([r["score"] for r in rows], [r["retrieval"]["kl"] for r in rows], [r["text"]["kl"] for r in rows])
    for axis, y in zip(axes, heights, strict=True):
        axis.plot(x, y, marker="o", ms=4, lw=1.4, label=label, zorder=3 if label == SHOWN[0] else 2)
