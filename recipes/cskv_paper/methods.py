"""Method by ratio: CSKV (arXiv 2409.10593), Tables 1 and 2.

Half and a fifth of the channels kept, 16 bits: StreamingLLM at the bytes that CSKV really holds, ASVD without training,
the paper's recipe, and this library's closed forms. Departures: H2O is not here; all rows keep 4 sinks and a window of
32; fewer steps than the paper's, at a learning rate as much higher, and one row at its own.
"""

from typing import Any

from kvshrink.eval.run.entries import FULL, ZEROS, Entry
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.methods.lowrank.cskv import CSKV
from recipes.cskv_paper import charts, words
from recipes.cskv_paper.lab import PAPER_LR, PAPER_STEPS, Lab
from recipes.cskv_paper.rows import LINES, LONG, Verdict, better, keeps

TITLE = "Methods (Tables 1 and 2)"
KEEPS = (0.5, 0.2)
NEAR = 0.1  # of a score lost, that still counts as little: the paper's CSKV loses .08 at most
# LongChat-7B, mean of LongEval's four lengths
PAPER = {
    "full": 0.99,
    "50 %": {"StreamingLLM": 0.135, "H2O": 0.55, "ASVD": 0.935, "CSKV": 0.955},
    "80 %": {"StreamingLLM": 0.045, "H2O": 0.19, "ASVD": 0.12, "CSKV": 0.925},
}
STREAMING, ASVD = "StreamingLLM, same bytes", "ASVD, untrained"
RECIPE, OWN_LR = "CSKV, paper's recipe", "CSKV, recipe at lr 5e-5"
PCA, WEIGHTED = "CSKV, closed form", "CSKV, weighted closed form"
ORDER = (STREAMING, ASVD, OWN_LR, RECIPE, PCA, WEIGHTED)
SCORES = {"lines": charts.LINES, "needle": "needle right", "passkey/book": "passkey right", "kl": charts.KL_SHORT}


def run(lab: Lab) -> dict:
    kinds = {keep: _methods(lab, keep) for keep in KEEPS}
    fitted = lab.fit([m for own in kinds.values() for m in own.values()])
    entries = [Entry(FULL, None), Entry(ZEROS, None)]
    points: dict[str, dict] = {}
    for keep, own in kinds.items():
        made = [Entry(_label(kind, keep), fitted[method]) for kind, method in own.items()]
        made.append(Entry(_label(STREAMING, keep), StreamingLLM(), _label(PCA, keep)))
        entries += made
        points |= {e.label: {"kind": kind, "keep": keep} for e, kind in zip(made, [*own, STREAMING], strict=True)}
    measured = lab.measure(entries, (*LINES, *LONG))
    rows = [{**points.get(label, {"kind": label, "keep": None}), **row} for label, row in measured.items()]
    return {"rows": rows, "paper": PAPER, "steps": lab.settings.steps, "lr": lab.settings.lr}


def draw(data: dict) -> Any:
    kinds = [k for k in ORDER if any(r["kind"] == k for r in data["rows"])]
    series = {_removed(keep): [r for r in data["rows"] if r["keep"] == keep] for keep in KEEPS}
    figure, axes = charts.panels(len(SCORES), 2.4, 2.7, sharey=True)
    look = charts.looks(list(series))
    handles: dict = {}
    full = next((r for r in data["rows"] if r["label"] == FULL), None)
    for axis, (what, title) in zip(axes, SCORES.items(), strict=True):
        points = {name: [p for r in own for p in _points(r, what, kinds)] for name, own in series.items()}
        handles |= charts.dots(axis, kinds, points, look)
        axis.set_xlabel(title)
        if what == "kl":
            charts.logs(axis, "x", [p.x for own in points.values() for p in own])
            continue
        axis.set_xlim(-0.04, 1.04)
        if full and (got := _value(full, what)):
            handles["full cache"] = axis.axvline(got["score"], color=charts.INK, ls="--", lw=1)
    charts.legend(figure, handles)
    return figure


def say(data: dict) -> list[str]:
    rows = {r["label"]: r for r in data["rows"]}
    low, high = min(KEEPS), max(KEEPS)
    pairs = [(_removed(k), v) for k in KEEPS if (v := _pair(rows, RECIPE, STREAMING, k))]
    recipe = f"{data['steps']} steps at lr {data['lr']:.2g} here, {PAPER_STEPS:,} at {PAPER_LR:.0e} in the paper"
    out = [
        _little(rows, RECIPE, low, f"CSKV at 80 % loses little (.93 of .99; {recipe})."),
        _little(rows, ASVD, high, "ASVD without training loses little at 50 % (.94 of .99)."),
        words.claim("at 80 % ASVD without training fails (.12 against .93).", _pair(rows, RECIPE, ASVD, low)),
        words.tally("StreamingLLM is far below CSKV (.05 against .93 at 80 %, .14 against .96 at 50 %).", pairs),
    ]
    for kind, text in ((RECIPE, "trained factors"), (WEIGHTED, "the weighted closed form")):
        found = [(_removed(k), v) for k in KEEPS if (v := _pair(rows, PCA, kind, k))]
        out.append(words.beside(f"the plain closed form, beside {text},", found))
    return out


def _methods(lab: Lab, keep: float) -> dict[str, CSKV]:
    return {
        ASVD: lab.cskv(keep, init="asvd"),
        OWN_LR: lab.trained(keep, lr=PAPER_LR),
        RECIPE: lab.trained(keep),
        PCA: lab.cskv(keep),
        WEIGHTED: lab.cskv(keep, key_metric="query", value_metric="output"),
    }


def _label(kind: str, keep: float) -> str:
    return f"{kind} @{keep:g}"


def _removed(keep: float) -> str:
    return f"{100 * (1 - keep):.0f} % removed"


def _value(row: dict, what: str) -> dict | None:
    return row[what] if what in ("lines", "kl") else next((t for t in row["tasks"] if t["task"] == what), None)


def _points(row: dict, what: str, kinds: list[str]) -> list[charts.Point]:
    got = _value(row, what)
    if not got:
        return []
    return [charts.Point(got["mean" if what == "kl" else "score"], kinds.index(row["kind"]), got["low"], got["high"])]


def _pair(rows: dict, a: str, b: str, keep: float) -> Verdict:
    first, second = rows.get(_label(a, keep)), rows.get(_label(b, keep))
    return better(first, second) if first and second else Verdict(0, "")


def _little(rows: dict, kind: str, keep: float, paper: str) -> str:
    """Whether a method is within NEAR of the full cache's score."""
    full, own = rows.get(FULL), rows.get(_label(kind, keep))
    if not full or not own:
        return words.near(paper, None, "not measured")
    return words.near(paper, keeps(full, own, NEAR), f"{words.scored(own)}; full cache {words.scored(full)}")
