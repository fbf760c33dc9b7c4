"""What training costs and gains: CSKV (arXiv 2409.10593), its training curve, beside the closed form.

The loss is the paper's: mean squared error of keys and values, summed over layers. Without quantisation the closed form
is its least value at a rank (Eckart-Young), so a curve can only come near its line. Departure: steps and learning rate.
"""

import time
from typing import Any

from kvshrink.eval.run.fitting import BATCH
from kvshrink.fit import fit
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.lowrank.cskv import CSKV
from recipes.cskv_paper import charts, words
from recipes.cskv_paper.lab import PAPER_LR, PAPER_STEPS, Lab

TITLE = "Training (curve and cost)"
KEEP = 0.2
INITS = ("random", "svd", "asvd", "pca")
SIDES = ("key", "value")
CLOSED = "closed form"
PAPER = {"first": 5.5, "last": 4.0, "gpu_minutes": 90}  # its summed loss at 80 %, from the ASVD start
CLOSE = 0.05  # of the closed form's loss, that counts as having reached it


def run(lab: Lab) -> dict:
    lrs = dict.fromkeys((lab.settings.lr, PAPER_LR))  # one, where the steps are the paper's
    methods = {
        (init, lr): lab.trained(KEEP, init, lr=lr)
        for init in INITS
        for lr in lrs
        if init == "asvd" or lr == lab.settings.lr
    }
    starts = {init: lab.cskv(KEEP, init=init) for init in INITS}
    fitted = lab.fit([*methods.values(), *starts.values()])
    closed = fitted[starts["pca"]]
    alone = lab.recorded(
        ("seconds", starts["pca"].settings(), len(lab.texts)), lambda: {"seconds": _seconds(lab, starts["pca"])}
    )
    rows = []
    for (init, lr), method in methods.items():
        own = fitted[method]
        more = _own_seconds(own) - _own_seconds(closed)
        rows.append(
            {
                "label": f"{init}, lr {lr:.2g}",
                "init": init,
                "lr": lr,
                "curve": _curve(own),
                "start": loss(fitted[starts[init]]),
                "end": loss(own),
                "time": round(1 + max(0.0, more) / alone["seconds"], 2),
            }
        )
    return {"rows": rows, "closed": loss(closed), "keep": KEEP, "steps": lab.settings.steps, "paper": PAPER}


def loss(artifact: Artifact) -> float:
    """The paper's loss over the whole calibration text, summed over layers: relative errors times the variances."""
    total = 0.0
    for i, fitted in artifact.layers.items():
        record = artifact.provenance["layers"][str(i)]
        for side in SIDES:
            spectrum = fitted[f"{side}_spectrum"].double()
            total += record[f"{side}_error"] * float(spectrum.square().mean())
    return round(total, 6)


def draw(data: dict) -> Any:
    figure, (curves, times) = charts.panels(2, 4.2, 3.1)
    look = charts.looks([r["label"] for r in data["rows"]])
    series = {r["label"]: [charts.Point(*p) for p in r["curve"]] for r in data["rows"]}
    handles = {}
    for name, points in series.items():
        if points:
            (handles[name],) = curves.plot(
                [p.x for p in points], [p.y for p in points], color=look[name].colour, lw=1.2
            )
    handles[CLOSED] = curves.axhline(data["closed"], color=charts.INK, ls="--", lw=1)
    charts.logs(curves, "y", [p.y for points in series.values() for p in points] + [data["closed"]])
    curves.set_xlabel("step")
    curves.set_ylabel("loss, summed over layers")
    names = [CLOSED, *(r["label"] for r in data["rows"])]
    colours = [charts.INK, *(look[r["label"]].colour for r in data["rows"])]
    values = [1.0, *(r["time"] for r in data["rows"])]
    times.barh(range(len(names)), values, color=colours, height=0.5)
    for y, value in enumerate(values):
        times.text(value, y, f" {value:.3g}", va="center", fontsize=8)
    times.set_yticks(range(len(names)), names)
    times.invert_yaxis()
    times.grid(visible=False)
    times.margins(x=0.15)
    times.set_xlabel("time of a fit, in times of the closed form's")
    charts.legend(figure, handles)
    return figure


def say(data: dict) -> list[str]:
    closed, out = data["closed"], []
    for r in data["rows"]:
        gap = r["start"] - closed
        part = (
            f", {100 * (r['start'] - r['end']) / gap:.0f} % of the way to the closed form"
            if gap > CLOSE * closed
            else ""
        )
        reached = "reaches" if r["end"] <= (1 + CLOSE) * closed else "stays above"
        out.append(
            f"{r['label']}: {r['start']:.4g} to {r['end']:.4g} in {data['steps']} steps{part}; it {reached} the closed "
            f"form's {closed:.4g} and takes {r['time']:.3g} times as long."
        )
    asvd = next((r for r in data["rows"] if r["init"] == "asvd"), None)
    random = next((r for r in data["rows"] if r["init"] == "random"), None)
    if asvd:
        first, last = PAPER["first"], PAPER["last"]
        ours = asvd["end"] / asvd["start"]
        out.append(
            words.near(
                f"training takes ASVD from {first} to {last} (a factor of {last / first:.2f}, {PAPER_STEPS:,} steps).",
                ours < 1,
                f"a factor of {ours:.2f}; the closed form's is {closed / asvd['start']:.2f}",
            )
        )
    if asvd and random:
        out.append(
            words.near(
                "a random start stays orders of magnitude above (1e9).",
                random["end"] > 10 * asvd["end"],
                f"{random['end']:.4g} against {asvd['end']:.4g}, from an orthonormal start",
            )
        )
    return out


def table(data: dict) -> tuple[tuple[str, ...], list]:
    head = ("start", "loss before", "loss after", "closed form", "time over the closed form's")
    rows = [
        (r["label"], f"{r['start']:.4g}", f"{r['end']:.4g}", f"{data['closed']:.4g}", f"{r['time']:.3g}")
        for r in data["rows"]
    ]
    return head, rows


def _seconds(lab: Lab, method: CSKV) -> float:
    """Of a fit of the closed form by itself, the pass over the text included."""
    started = time.perf_counter()
    fit(lab.model, method, lab.texts, lab.tokenizer, batch=BATCH)
    return round(time.perf_counter() - started, 3)


def _own_seconds(artifact: Artifact) -> float:
    """Of a method's own work, without the pass over the text that it shared with others."""
    return sum(record["seconds"] for record in artifact.provenance["layers"].values())


def _curve(artifact: Artifact) -> list[list[float]]:
    """[step, loss summed over layers]."""
    records = artifact.provenance["layers"].values()
    curves = [record.get("training", record).get("curve", []) for record in records]
    if not curves or not all(len(c) == len(curves[0]) for c in curves):
        return []
    return [[points[0][0], round(sum(y for _, y in points), 6)] for points in zip(*curves, strict=True)]
