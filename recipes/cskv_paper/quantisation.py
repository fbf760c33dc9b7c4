"""4-bit latents: CSKV (arXiv 2409.10593), Table 5, and whether its PTQ of 0.00 is the official clamped zero point.

none: 16 bits; PTQ: the same factors, latents quantised afterwards; QAT: trained through the quantiser. The official
formula is simulated (official_quantiser.py): it saves nothing, and is here to measure its error. Departure: QAT trains
through our quantiser, not the official one.
"""

from statistics import mean
from typing import Any

from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.methods.artifact import Artifact
from recipes.cskv_paper import charts, words
from recipes.cskv_paper.lab import Lab, relabelled
from recipes.cskv_paper.latents import OFFICIAL, OURS, SIDES, UNCLAMPED, latent_rows
from recipes.cskv_paper.official_quantiser import official
from recipes.cskv_paper.rows import Verdict, better, keeps, nothing
from recipes.cskv_paper.words import listed

TITLE = "Quantisation (Table 5)"
KEEPS = (0.5, 0.4, 0.3, 0.2)
BITS = 4
STARTS = {"asvd": "paper's recipe", "pca": "closed form"}
NONE, PTQ, QAT, CLAMPED = "none", "PTQ", "QAT", "PTQ, official formula (simulated)"
KINDS = (NONE, PTQ, QAT, CLAMPED)
SCORES = {NONE: (0.95, 0.94, 0.93, 0.92), PTQ: (0, 0, 0, 0), QAT: (0.96, 0.94, 0.92, 0.90)}
PAPER = {kind: dict(zip(KEEPS, scores, strict=True)) for kind, scores in SCORES.items()}
FAILED, NEAR = 0.1, 0.1  # a score that counts as none; a loss of score that counts as little


def run(lab: Lab) -> dict:
    plain = {(s, k): lab.trained(k, s) if s == "asvd" else lab.cskv(k) for s in STARTS for k in KEEPS}
    aware = {(s, k): lab.trained(k, s, bits=BITS, qat=True) for s in STARTS for k in KEEPS}
    fitted = lab.fit([*plain.values(), *aware.values()])
    after = {at: relabelled(fitted[m], bits=BITS) for at, m in plain.items()}
    made: dict[tuple[str, float, str], Artifact] = {}
    for at, method in plain.items():
        kinds = {NONE: fitted[method], PTQ: after[at], QAT: fitted[aware[at]], CLAMPED: official(after[at])}
        made |= {(*at, kind): artifact for kind, artifact in kinds.items()}
    measured = lab.measure([Entry(FULL, None), *(Entry(_label(*at), a) for at, a in made.items())])
    named = {
        _label(*at): {**dict(zip(("start", "keep", "kind"), at, strict=True)), "simulated": at[2] == CLAMPED}
        for at in made
    }
    none = dict.fromkeys(("start", "keep", "kind"))
    rows = [{**named.get(label, {**none, "simulated": False}), **row} for label, row in measured.items()]
    latents = [
        {"start": s, "keep": k, **row}
        for (s, k), a in after.items()
        for row in latent_rows(lab, {_label(s, k, PTQ): a})
    ]
    return {"rows": rows, "latents": latents, "paper": PAPER, "steps": lab.settings.steps, "bits": BITS}


def draw(data: dict) -> Any:
    plt = charts.plots.pyplot()
    figure, grid = plt.subplots(2, 3, figsize=(9.9, 5.8), layout="constrained")
    look = charts.looks(KINDS)
    handles: dict = {}
    full = next((r for r in data["rows"] if r["label"] == FULL), None)
    for column, (start, title) in enumerate(STARTS.items()):
        for axis, at in zip(grid[:, column], (charts.lines_at, charts.kl_at), strict=True):
            series = {k: [p for r in _own(data, start, k) for p in at(r, 100 * (1 - r["keep"]))] for k in KINDS}
            handles |= charts.curves(axis, series, look, dashed=[CLAMPED], spread=0.6)
            axis.set_xlabel("channels removed, %")
        grid[0][column].set_title(f"{title}, {data['bits']} bits", loc="left")
        charts.scores_axis(grid[0][column])
        handles |= charts.full_line(grid[0][column], full)
        charts.kl_axis(grid[1][column])
    told = {kind: [charts.Point(100 * (1 - keep), y) for keep, y in own.items()] for kind, own in PAPER.items()}
    charts.curves(grid[0][2], told, look)
    charts.scores_axis(grid[0][2])
    grid[0][2].set_title("the paper, LongChat-7B", loc="left")
    grid[0][2].set_xlabel("channels removed, %")
    _errors(grid[1][2], data)
    charts.legend(figure, handles)
    return figure


def say(data: dict) -> list[str]:
    rows = {r["label"]: r for r in data["rows"]}
    recipe, closed = STARTS
    ptq = [(_removed(r["keep"]), nothing(r, FAILED)) for r in _own(data, recipe, PTQ) if r["lines"]]
    return [
        words.tally("PTQ scores 0 at every ratio (ours with our quantiser).", ptq),
        words.tally("QAT is above PTQ at every ratio.", _pairs(rows, recipe, QAT, PTQ)),
        _little(rows, recipe),
        words.beside("with the closed form, PTQ, beside no quantisation,", _pairs(rows, closed, PTQ, NONE)),
        words.beside("with the closed form, QAT, beside PTQ,", _pairs(rows, closed, QAT, PTQ)),
        *_clamp(data, rows),
    ]


def table(data: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The latents' errors, mean over layers: what the page shows beside the scores."""
    head = (
        "factors",
        "removed",
        "side",
        "groups of one sign",
        *(f"latent error, {q}" for q in QUANTISERS),
        "rank alone",
    )
    head += tuple(f"rebuilt, {q}" for q in QUANTISERS)
    rows = []
    for start, title in STARTS.items():
        for keep in KEEPS:
            for side in SIDES:
                own = _latents(data, start, keep, side)
                if own:
                    errors = [f"{mean(x['latent'][q] for x in own):.3f}" for q in QUANTISERS]
                    built = [f"{mean(x['rebuilt'][q] for x in own):.3f}" for q in QUANTISERS]
                    share = f"{100 * mean(x['one_sign'] for x in own):.1f} %"
                    rank = f"{mean(x['rank'] for x in own):.3f}"
                    rows.append((title, _removed(keep), side, share, *errors, rank, *built))
    return head, rows


ROOM = 1.3  # rows of dots that the legend takes
QUANTISERS = (OFFICIAL, UNCLAMPED, OURS)


def _clamp(data: dict, rows: dict[str, dict]) -> list[str]:
    """The question, answered by what the official formula costs beside ours."""
    start = "asvd"
    clamped = [r for r in _own(data, start, CLAMPED) if r["lines"]]
    ours = [r for r in _own(data, start, PTQ) if r["lines"]]
    if not clamped or not ours:
        return ["Whether the clamped zero point explains the paper's PTQ of 0 was not measured."]
    collapsed, stands = ([r["lines"]["score"] <= FAILED for r in own] for own in (clamped, ours))
    pairs = _pairs(rows, start, PTQ, CLAMPED)
    if all(collapsed) and not any(stands):
        answer = "Yes, on this model: with the official formula PTQ falls to nothing, with ours it does not."
    elif any(c and not s for c, s in zip(collapsed, stands, strict=True)):
        answer = (
            "In part, on this model: at some ratios PTQ falls to nothing with the official formula and not with ours."
        )
    elif any(v.sign > 0 and v.by == "answers" for _, v in pairs):
        answer = "Not by itself, on this model: the official formula loses answers, but not all."
    else:
        answer = "No, on this model: with the official formula PTQ does not surely answer less than with ours."
    return [
        f"**Is the paper's PTQ of 0.00 the clamped zero point? {answer}**",
        f"With the recipe's factors, ours, beside the official formula, is {words.sorted_out(pairs, 1, words.BETTER)}.",
        *(_groups(data, s, title) for s, title in STARTS.items()),
    ]


def _groups(data: dict, start: str, title: str) -> str:
    """How many groups are of one sign at the smallest rank, and what that does to the latents."""
    parts, keep = [], min(KEEPS)
    for side in SIDES:
        if own := _latents(data, start, keep, side):
            errors = listed(f"{mean(x['latent'][q] for x in own):.3f} by {q}" for q in QUANTISERS)
            worst = max(own, key=lambda x: x["latent"][OFFICIAL])
            share = f"{100 * mean(x['one_sign'] for x in own):.1f} % of groups"
            parts.append(
                f"{side}s {share}, error {errors} (layer {worst['layer']}: "
                f"{100 * worst['one_sign']:.1f} %, {worst['latent'][OFFICIAL]:.3f} against {worst['latent'][OURS]:.3f})"
            )
    centred = "which is centred" if start == "pca" else "which is not centred"
    return f"Latents of one sign at {_removed(keep)} removed, {title}, {centred}: {'; '.join(parts)}."


def _little(rows: dict, start: str) -> str:
    """Whether quantisation-aware training loses little against no quantisation."""
    pairs = [(k, rows.get(_label(start, k, NONE)), rows.get(_label(start, k, QAT))) for k in KEEPS]
    known = [(k, a, b, keeps(a, b, NEAR)) for k, a, b in pairs if a and b and a["lines"] and b["lines"]]
    kept = [ok for *_, ok in known]
    verdict = None if not kept else False if False in kept else None if None in kept else True
    scores = (
        f"{words.number(b['lines']['score'])} for {words.number(a['lines']['score'])} at {_removed(k)}"
        for k, a, b, _ in known
    )
    return words.near("QAT at 4 bits is within .02 of no quantisation.", verdict, listed(scores) or "not measured")


def _pairs(rows: dict, start: str, a: str, b: str) -> list[tuple[str, Verdict]]:
    pairs = [(k, rows.get(_label(start, k, a)), rows.get(_label(start, k, b))) for k in KEEPS]
    return [(_removed(k), better(x, y)) for k, x, y in pairs if x and y]


def _errors(axis: Any, data: dict) -> None:
    """Error of the latents by layer at the smallest rank: one mark per quantiser, keys and values."""
    keep, look = min(KEEPS), charts.looks(QUANTISERS)
    own = [(s, side) for s in STARTS for side in SIDES]
    labels = [f"{STARTS[s]}, {side}s" for s, side in own]
    series = {
        q: [charts.Point(x["latent"][q], i) for i, at in enumerate(own) for x in _latents(data, at[0], keep, at[1])]
        for q in QUANTISERS
    }
    handles = charts.dots(axis, labels, series, look)
    charts.logs(axis, "x", [p.x for own in series.values() for p in own])
    axis.set_xlabel(f"error of latents by layer, {_removed(keep)} removed")
    axis.set_ylim(len(labels) + ROOM, -0.5)
    axis.legend(handles.values(), handles, fontsize=7, loc="lower right")


def _latents(data: dict, start: str, keep: float, side: str) -> list[dict]:
    return [x for x in data["latents"] if (x["start"], x["keep"], x["side"]) == (start, keep, side)]


def _removed(keep: float) -> str:
    return f"{100 * (1 - keep):.0f} %"


def _label(start: str, keep: float, kind: str) -> str:
    return f"{STARTS[start]} @{keep:g}, {kind}"


def _own(data: dict, start: str, kind: str) -> list[dict]:
    return [r for r in data["rows"] if r["start"] == start and r["kind"] == kind]
