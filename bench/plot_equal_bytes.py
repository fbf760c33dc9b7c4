"""The picture of bench/equal_bytes.py: answers and KL against bytes really held."""

from pathlib import Path

from kvshrink.eval.plots import pyplot, save

SHOWN = ("spectral", "CSKV pca int4", "CSKV paper int4", "KIVI", "int4", "int3", "int2", "StreamingLLM")


def draw(found: dict, path: Path) -> None:
    """Columns: length; rows: share of right answers, KL over question and answer, KL over held-out text."""
    plt = pyplot()
    lengths = sorted({r["length"] for r in found["rows"]})
    figure, axes = plt.subplots(
        3, len(lengths), figsize=(5.2 * len(lengths), 10), sharey="row", layout="constrained", squeeze=False
    )
    for column, length in zip(axes.T, lengths, strict=True):
        rows = [r for r in found["rows"] if r["length"] == length]
        full = next(r for r in rows if r["series"] == "full")
        column[0].axhline(full["score"], color="0.5", lw=1, ls=":", label="full cache")
        for label in SHOWN:
            line = sorted((r for r in rows if r["series"] == label), key=lambda r: r["kept"])
            x = [100 * r["kept"] for r in line]
            for axis, y in (
                (column[0], [r["score"] for r in line]),
                (column[1], [r["retrieval"]["kl"] for r in line]),
                (column[2], [r["text"]["kl"] for r in line]),
            ):
                axis.plot(x, y, marker="o", ms=4, lw=1.4, label=label, zorder=3 if label == "spectral" else 2)
        column[0].set_title(f"{length} tokens")
        for axis in column:
            axis.set_xscale("log")
            axis.set_xticks([4, 6.25, 12.5, 20, 30], ["4", "6.25", "12.5", "20", "30"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        column[1].set_yscale("log")
        column[2].set_yscale("log")
        column[2].set_xlabel("bytes held, % of the full cache's")
    axes[0, 0].set_ylabel("right answers, mean of four tasks")
    axes[1, 0].set_ylabel("KL, question and answer (nats)")
    axes[2, 0].set_ylabel("KL, held-out text (nats)")
    axes[0, 0].legend(fontsize=7)
    save(figure, path)
