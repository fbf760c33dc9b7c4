"""The picture of bench/decode.py: time and bytes against context, and time against the time to read the bytes held."""

from pathlib import Path

from kvshrink.eval.report.plots import pyplot, save


def draw(points: list[dict], path: Path) -> None:
    """Points of one batch, by context."""
    plt = pyplot()
    figure, (time, held, roof) = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained")
    names = list(dict.fromkeys(r["contender"] for p in points for r in p["rows"]))
    everywhere = [n for n in names if all(_row(p, n) is not None for p in points)]
    for name in everywhere:
        rows = [_row(p, name) for p in points]
        x, style = [p["tokens"] for p in points], "--" if name.startswith(("full", "DynamicCache")) else "-"
        held_as = [r["byte_ratio"] * p["tokens"] for p, r in zip(points, rows, strict=True)]
        reads = [k * r["over_byte_floor"] for k, r in zip(held_as, rows, strict=True)]
        time.plot(x, reads, style, marker="o", ms=4, label=name)
        held.plot(x, held_as, style, marker="o", ms=4)
    longest = max(points, key=lambda p: len(p["rows"]))
    rows = sorted(longest["rows"], key=lambda r: -r["ratio"])
    roof.barh([r["contender"] for r in rows], [r["over_byte_floor"] for r in rows], color="0.6")
    roof.axvline(1, color="k", lw=1)
    roof.set_title(f"{longest['tokens']} tokens: time of a step / time to read the bytes held", fontsize=10)
    roof.tick_params(labelsize=8)
    time.set_title("time of a decode step, in readings of a full token's bytes", fontsize=10)
    held.set_title("bytes held, as tokens of the full cache", fontsize=10)
    for axis in (time, held):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    roof.set_xscale("log")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save(figure, path)


def _row(point: dict, name: str) -> dict | None:
    return next((r for r in point["rows"] if r["contender"] == name), None)
