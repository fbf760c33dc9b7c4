"""The table and the picture of bench/quantisers.py."""

from pathlib import Path

from kvshrink.eval.report.plots import pyplot, save


def table(rows: list[dict]) -> str:
    """Markdown, most bytes first."""
    grows = all("byte_ratio_later" in r for r in rows)
    names = ["method", "bits stored", "of full cache", *(["127 tokens later"] if grows else [])]
    answered = all("score" in r for r in rows)
    names += ["KL, text", "KL, retrieval", *(["right answers"] if answered else [])]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for r in sorted(rows, key=lambda r: (-r["byte_ratio"], r["label"])):
        cells = [f"`{r['label']}`" if r["group"] not in ("peer", "full") else r["label"], f"{r['bits']:.2f}"]
        cells += [f"{100 * r[name]:.1f} %" for name in ("byte_ratio", "byte_ratio_later")[: 1 + grows]]
        cells += [f"{r['kl_text']:.4f}", f"{r['kl_retrieval']:.4f}"]
        if answered:
            cells.append(f"{r['score']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def front(rows: list[dict], value: str, better: float) -> list[dict]:
    """Rows that no other beats in bytes and value."""
    out: list[dict] = []
    for r in sorted(rows, key=lambda r: (r["byte_ratio"], better * r[value])):
        if not out or better * r[value] < better * out[-1][value]:
            out.append(r)
    return out


def draw(rows: list[dict], path: Path) -> None:
    """KL and right answers against bytes held; the front of ours is named."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    mine = [r for r in rows if r["group"] not in ("peer", "full")]
    theirs = [r for r in rows if r["group"] == "peer"]
    values = (("kl_text", "KL, held-out text (nats)", 1), ("kl_retrieval", "KL, question and answer (nats)", 1))
    for axis, (value, title, better) in zip(axes, (*values, ("score", "right answers", -1)), strict=True):
        for group, colour, label in ((theirs, "tab:red", "QuantizedCache"), (mine, "tab:blue", "kvshrink")):
            axis.plot(
                [100 * r["byte_ratio"] for r in group], [r[value] for r in group], "o", ms=4, color=colour, label=label
            )
        for r in front(mine, value, better):
            name = r["label"].replace(" w32", "").replace("bits=", "")
            axis.annotate(
                name,
                (100 * r["byte_ratio"], r[value]),
                fontsize=6,
                rotation=30,
                xytext=(2, 2),
                textcoords="offset points",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("bytes held, % of the full cache's")
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_yscale("log")
    axes[2].axhline(
        next(r["score"] for r in rows if r["group"] == "full"), color="0.5", lw=1, ls=":", label="full cache"
    )
    axes[2].legend(fontsize=8)
    save(figure, path)


def front_picture(rows: list[dict], path: Path) -> None:
    """KL of every composition: a column a budget, bars from the best to the worst."""
    plt = pyplot()
    groups = sorted({r["group"] for r in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 9), layout="constrained")
    for axis, group in zip(axes, groups, strict=True):
        mine = sorted((r for r in rows if r["group"] == group), key=lambda r: r["kl_text"] + r["kl_retrieval"])
        names = [r["label"].partition(" @")[0] for r in mine]
        at = range(len(mine))
        axis.barh([i - 0.2 for i in at], [r["kl_retrieval"] for r in mine], 0.4, label="question and answer")
        axis.barh([i + 0.2 for i in at], [r["kl_text"] for r in mine], 0.4, label="held-out text")
        axis.set_yticks(list(at), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("KL (nats)")
        axis.set_title(f"{100 * float(group):g} % of the full cache's bytes", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, path)
