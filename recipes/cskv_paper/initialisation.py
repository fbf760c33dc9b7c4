"""Where training starts: CSKV (arXiv 2409.10593), Table 3, with what each start is worth before it.

Departures: the random start is an orthonormal basis, which already rebuilds a share of every row (the paper's has a
loss of 1e9); "pca", the closed form, is the optimum of the paper's loss, so there is nothing for training to gain.
"""

from typing import Any

from kvshrink.eval.run.entries import FULL, Entry
from recipes.cskv_paper import charts, words
from recipes.cskv_paper.lab import Lab
from recipes.cskv_paper.rows import Verdict, better, nothing

TITLE = "Initialisation (Table 3)"
KEEPS = (0.5, 0.4, 0.3, 0.2)
INITS = ("random", "svd", "asvd", "pca")
FAILED = 0.1  # a score that counts as none
SCORES = {"random": (0, 0, 0, 0), "svd": (0.94, 0.93, 0.89, 0.87), "asvd": (0.95, 0.94, 0.93, 0.92)}
PAPER = {init: dict(zip(KEEPS, scores, strict=True)) for init, scores in SCORES.items()}
BEFORE, AFTER = "before", "after"


def run(lab: Lab) -> dict:
    points = {
        (init, keep, when): lab.trained(keep, init) if when == AFTER else lab.cskv(keep, init=init)
        for init in INITS
        for keep in KEEPS
        for when in (BEFORE, AFTER)
    }
    fitted = lab.fit(list(points.values()))
    entries = [Entry(FULL, None), *(Entry(_label(*at), fitted[method]) for at, method in points.items())]
    measured = lab.measure(entries)
    named = {_label(*at): dict(zip(("init", "keep", "when"), at, strict=True)) for at in points}
    none = dict.fromkeys(("init", "keep", "when"))
    rows = [{**named.get(label, none), **row} for label, row in measured.items()]
    return {"rows": rows, "paper": PAPER, "steps": lab.settings.steps, "lr": lab.settings.lr}


def draw(data: dict) -> Any:
    names = {(init, when): f"{init}, {when} training" for when in (BEFORE, AFTER) for init in INITS}
    # a start looks the same before and after; before is dashed
    looks = charts.looks(INITS)
    look = {name: looks[init] for (init, _), name in names.items()}
    dashed = [name for (_, when), name in names.items() if when == BEFORE]
    figure, axes = charts.panels(3, 3.1, 3.1)
    handles: dict = {}
    for axis, at in zip(axes, (charts.lines_at, charts.kl_at), strict=False):
        series = {
            name: [p for r in _own(data, *key) for p in at(r, 100 * (1 - r["keep"]))] for key, name in names.items()
        }
        drawn = charts.curves(axis, series, look, dashed, spread=0.5)
        handles |= {init: drawn[name] for (init, when), name in names.items() if when == AFTER and name in drawn}
        axis.set_xlabel("channels removed, %")
    charts.scores_axis(axes[0])
    handles |= charts.dashed_key(axes[0], "before training")
    handles |= charts.full_line(axes[0], next((r for r in data["rows"] if r["label"] == FULL), None))
    charts.kl_axis(axes[1])
    told = {
        names[init, AFTER]: [charts.Point(100 * (1 - keep), y) for keep, y in own.items()]
        for init, own in PAPER.items()
    }
    charts.curves(axes[2], told, look)
    charts.scores_axis(axes[2])
    axes[2].set_xlabel("channels removed, %")
    axes[2].set_title("the paper, LongChat-7B, after training", loc="left")
    charts.legend(figure, handles)
    return figure


def say(data: dict) -> list[str]:
    rows = {r["label"]: r for r in data["rows"]}

    def pairs(a: tuple[str, str], b: tuple[str, str]) -> list[tuple[str, Verdict]]:
        found = []
        for keep in KEEPS:
            first, second = (rows.get(_label(init, keep, when)) for init, when in (a, b))
            if first and second:
                found.append((f"{100 * (1 - keep):.0f} %", better(first, second)))
        return found

    random = [r for r in _own(data, "random", AFTER) if r["lines"]]
    failed = [(f"{100 * (1 - r['keep']):.0f} %", nothing(r, FAILED)) for r in random]
    trained = ("asvd", AFTER)
    return [
        words.tally(
            f"a random start never learns (0 at every ratio; ours, of {data['steps']} steps, starts orthonormal).",
            failed,
        ),
        words.tally(
            "after training ASVD is above SVD (by .01 at 50 % to .05 at 80 %).", pairs(trained, ("svd", AFTER))
        ),
        words.tally(
            "training is what makes ASVD usable (at 80 %: .12 before, .92 after).", pairs(trained, ("asvd", BEFORE))
        ),
        words.beside("the closed form without training, beside trained ASVD,", pairs(("pca", BEFORE), trained)),
        words.beside(
            "the closed form without training, beside itself trained,", pairs(("pca", BEFORE), ("pca", AFTER))
        ),
    ]


def _label(init: str, keep: float, when: str) -> str:
    return f"{init} @{keep:g}, {when} training"


def _own(data: dict, init: str, when: str) -> list[dict]:
    return [r for r in data["rows"] if r["init"] == init and r["when"] == when]
