"""Keys against values: CSKV (arXiv 2409.10593), Table 4, in channels kept of the n that a key and a value have each.

The paper's labels can be read as shares kept or shares removed. At 50 % both give the same total; at 75 % the labels
sum to 50, which only fits shares kept. Departure: the closed form, the optimum of the loss that the paper trains.
"""

from math import log
from statistics import correlation
from typing import Any

from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.methods.lowrank.cskv import CSKV
from recipes.cskv_paper import charts, words
from recipes.cskv_paper.lab import Lab
from recipes.cskv_paper.rows import LEAST_KL, Verdict, better

TITLE = "Keys and values (Table 4)"
KEEPS = (0.5, 0.25)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
# by the first number of the label over both: LongChat-7B, LongEval
PAPER = {
    0.5: dict(zip(SHARES, (0.80, 0.94, 0.95, 0.95, 0.96, 0.98, 0.97), strict=True)),
    0.25: dict(zip(SHARES, (0.43, 0.80, 0.88, 0.93, 0.95, 0.89, 0.73), strict=True)),
}


def run(lab: Lab) -> dict:
    methods = {(k, s): lab.cskv(k, key_share=s) for k in KEEPS for s in SHARES}
    fitted = lab.fit(list(methods.values()))
    channels = {at: _kept(lab, m) for at, m in methods.items()}
    labels = {at: f"{k} key and {v} value channels of {lab.shape.width}" for at, (k, v) in channels.items()}
    entries = [Entry(FULL, None), *(Entry(labels[at], fitted[m]) for at, m in methods.items())]
    measured = lab.measure(entries)
    named = {}
    for (keep, share), (keys, values) in channels.items():
        told = {
            "as kept": PAPER[keep].get(share),
            "as removed": PAPER[keep].get(1 - share) if keep == max(KEEPS) else None,
        }
        named[labels[keep, share]] = {
            "keep": keep,
            "key_share": share,
            "key_channels": keys,
            "value_channels": values,
            "of": lab.shape.width,
            "paper": told,
        }
    none = dict.fromkeys(next(iter(named.values())))
    rows = [{**named.get(label, none), **row} for label, row in measured.items()]
    return {"rows": rows, "paper": {f"{k:g}": {f"{s:g}": y for s, y in own.items()} for k, own in PAPER.items()}}


def draw(data: dict) -> Any:
    names = {keep: f"{100 * (1 - keep):.0f} % of the channels removed" for keep in KEEPS}
    figure, axes = charts.panels(3, 3.1, 3.0)
    look = charts.looks(list(names.values()))
    handles: dict = {}
    for axis, at in zip(axes, (charts.lines_at, charts.kl_at), strict=False):
        series = {name: [p for r in _own(data, k) for p in at(r, 100 * r["key_share"])] for k, name in names.items()}
        handles |= charts.curves(axis, series, look, spread=0.8)
        axis.set_xlabel("keys' share of the kept channels, %")
    charts.scores_axis(axes[0])
    charts.kl_axis(axes[1])
    handles |= charts.full_line(axes[0], next((r for r in data["rows"] if r["label"] == FULL), None))
    told = {name: [charts.Point(100 * s, y) for s, y in PAPER[k].items()] for k, name in names.items()}
    charts.curves(axes[2], told, look)
    removed = [(100 * (1 - s), y) for s, y in PAPER[max(KEEPS)].items()]
    axes[2].plot(*zip(*sorted(removed), strict=True), color=look[names[max(KEEPS)]].colour, ls=":", lw=1)
    charts.scores_axis(axes[2])
    axes[2].set_xlabel("labels read as kept, % (dotted: removed)")
    axes[2].set_title("the paper, LongChat-7B", loc="left")
    charts.legend(figure, handles)
    return figure


def say(data: dict) -> list[str]:
    out = []
    for keep in KEEPS:
        rows = _own(data, keep)
        best = min((r for r in rows if r["kl"]), key=lambda r: r["kl"]["mean"], default=None)
        top = max((r for r in rows if r["lines"]), key=lambda r: r["lines"]["score"], default=None)
        if best is None or top is None:
            continue
        told = max(PAPER[keep], key=lambda s: PAPER[keep][s])
        theirs = next((r for r in rows if r["key_share"] == told), None)
        least, most = f"{best['label']}: {words.scored(best)}", f"{top['label']}: {words.scored(top)}"
        out.append(f"At {100 * (1 - keep):.0f} % removed: least KL at {least}; most lines right at {most}.")
        out.append(_alike(rows, keep))
        if keep == min(KEEPS) and theirs is not None:
            paper = f"keys get more: {100 * told:.1f} % of the kept channels are best."
            out.append(_best(paper, best, top, theirs))
    return out


def _best(paper: str, best: dict, top: dict, theirs: dict) -> str:
    """Whether the paper's best split has the least KL, and the most answers."""
    same = [row is theirs for row in (top, best)]
    if all(same):
        return words.claim(paper, Verdict(1, "the same, by answers and by KL"))
    if any(same):
        by, other = ("answers", "KL") if same[0] else ("KL", "answers")
        found = better(theirs, best if same[0] else top)
        return f"**Mixed.** The paper: {paper} Here: the same by {by}, another by {other} ({found.how})."
    found = better(theirs, best)
    return words.claim(paper, found._replace(how=f"{theirs['label']} against {best['label']}: {found.how}"))


def _alike(rows: list[dict], keep: float) -> str:
    """How our scores go with the paper's over the splits: under both readings of its labels where there are two."""
    parts, readings = [], {"kept": lambda s: s, "removed": lambda s: 1 - s}
    if keep != max(KEEPS):
        del readings["removed"]  # the labels' sum only fits shares kept
    for reading, of in readings.items():
        told = {r["label"]: PAPER[keep].get(of(r["key_share"])) for r in rows}
        answers = [(r["lines"]["score"], told[r["label"]]) for r in rows if r["lines"]]
        kl = [(-log(max(r["kl"]["mean"], LEAST_KL)), told[r["label"]]) for r in rows if r["kl"]]
        parts.append(f"read as {reading}: {_correlation(answers)} of answers, {_correlation(kl)} of -log KL")
    return f"Correlation with the paper's scores over the splits, its labels {'; '.join(parts)}."


def _correlation(pairs: list[tuple[float, float | None]]) -> str:
    known = [(x, y) for x, y in pairs if y is not None]
    if any(len({p[side] for p in known}) < 2 for side in (0, 1)):
        return "none"
    return f"{correlation(*zip(*known, strict=True)):+.2f}"


def _kept(lab: Lab, method: CSKV) -> tuple[int, int]:
    """Channels kept of a layer's keys and of its values, all heads together."""
    rank_k, rank_v = method.ranks(lab.shape)
    return rank_k * method.groups(lab.shape), rank_v


def _own(data: dict, keep: float) -> list[dict]:
    return sorted((r for r in data["rows"] if r["keep"] == keep), key=lambda r: r["key_share"])
