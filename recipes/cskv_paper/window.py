"""How many recent tokens are exact: CSKV (arXiv 2409.10593), the window ablation, at 80 % of the channels removed.

Departure: tokens leave the window in pages of 32, so a window of w is w to w + 31 exact tokens, and 4 sinks; the bytes
grow with the window and are given. A window stops where it would hold a whole context, so what is said rests on the
long tasks (needle and passkey) and the KL; lines are shown as far as their short contexts go.
"""

from typing import Any

from kvshrink.eval.run.entries import FULL, Entry
from recipes.cskv_paper import charts, words
from recipes.cskv_paper.lab import Lab, relabelled
from recipes.cskv_paper.rows import LINES, LONG, Verdict, better

TITLE = "Window (Figure)"
KEEP = 0.2
WINDOWS = tuple(2**i for i in range(1, 13))
SMALL, ENOUGH = 2, 32
# LongChat-7B, LongEval; 128 to 512 and 2048 to 4096 are given as one figure each
PAPER = {2: 0.77, 4: 0.83, 8: 0.85, 16: 0.88, 32: 0.92, 64: 0.93, 128: 0.94, 256: 0.94, 512: 0.94}
PAPER |= {1024: 0.95, 2048: 0.96, 4096: 0.96}
CLOSED, TRAINED = "closed form", "paper's recipe"


def run(lab: Lab) -> dict:
    kinds = {CLOSED: lab.cskv(KEEP), TRAINED: lab.trained(KEEP)}
    fitted = lab.fit(list(kinds.values()))
    points = {f"{kind}, window {w}": {"kind": kind, "window": w} for kind in kinds for w in WINDOWS if w < lab.length}
    entries = [Entry(FULL, None)]
    entries += [Entry(label, relabelled(fitted[kinds[p["kind"]]], window=p["window"])) for label, p in points.items()]
    measured = lab.measure(entries, (*LINES, *LONG))
    none = {"kind": None, "window": None}
    rows = [{**points.get(label, none), **row} for label, row in measured.items()]
    rows = [r for r in rows if r["tasks"] or r["kl"]]  # the others would compress nothing anywhere
    return {"rows": rows, "paper": {str(w): score for w, score in PAPER.items()}, "keep": KEEP}


def draw(data: dict) -> Any:
    figure, axes = charts.panels(3, 3.1, 3.0)
    look = charts.looks([CLOSED, TRAINED])
    handles: dict = {}
    most = max((r["window"] or 0 for r in data["rows"]), default=0)
    full = next((r for r in data["rows"] if r["label"] == FULL), None)
    for axis, at in zip(axes, (charts.lines_at, charts.long_at, charts.kl_at), strict=True):
        series = {k: [p for r in _own(data, k) for p in at(r, r["window"])] for k in (CLOSED, TRAINED)}
        handles |= charts.curves(axis, series, look, spread=0.15, octaves=True)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("window, tokens")
        ticks = [w for w in WINDOWS if w <= most][::2]
        axis.set_xticks(ticks, [str(w) for w in ticks])
        axis.set_xticks([], minor=True)
    for axis in axes[:2]:
        charts.scores_axis(axis)
    axes[0].set_ylabel("LongEval lines right, short contexts")
    axes[1].set_ylabel("needle and passkey right")
    axes[0].set_xlim(axes[1].get_xlim())
    charts.kl_axis(axes[2])
    handles |= charts.paper(axes[0], [(w, y) for w, y in PAPER.items() if w <= most])
    handles |= charts.full_line(axes[0], full)
    charts.legend(figure, handles)
    return figure


def say(data: dict) -> list[str]:
    out = []
    for kind in (TRAINED, CLOSED):
        own = {r["window"]: r for r in _own(data, kind)}
        most = max(own, default=0)
        known = [(w, own[w]) for w in (SMALL, ENOUGH, most) if w in own]
        here = "; ".join(f"{w}: {words.scored(r, 'long')}, {_bytes(r)}" for w, r in dict(known).items())
        gain = better(own[ENOUGH], own[SMALL], "long") if {SMALL, ENOUGH} <= set(own) else Verdict(0, "")
        more = better(own[most], own[ENOUGH], "long") if ENOUGH in own and most > ENOUGH else Verdict(0, "")
        out += [
            f"{kind[:1].upper()}{kind[1:]}, needle and passkey ({here}).",
            words.claim(f"a window of {ENOUGH} is worth .15 over one of {SMALL} (.92, .77).", gain),
            words.claim(f"beyond {ENOUGH} there is a little more (.96 at 2048).", more),
        ]
    return out


def _bytes(row: dict) -> str:
    ratio = (row["kl"] or row["long"] or {}).get("byte_ratio")
    return "bytes not measured" if ratio is None else f"{100 * ratio:.0f} % of the bytes"


def _own(data: dict, kind: str) -> list[dict]:
    return sorted((r for r in data["rows"] if r["kind"] == kind), key=lambda r: r["window"])
