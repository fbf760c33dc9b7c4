"""Tables as plain data: a page and a Markdown file show the same cells. Numbers stay beside their text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvshrink.eval.report.results import budget, of, targets, unique
from kvshrink.eval.report.standings import Standing
from kvshrink.eval.run.entries import CONTROLS
from kvshrink.store.bytes import human


@dataclass(frozen=True)
class Cell:
    """text: what is read. value: what is sorted by. interval: (low, high), shown behind the text.

    series: the method whose colour goes before the text. kind: how it looks. span: score interval drawn as a whisker.
    """

    text: str
    value: float | str | None = None
    interval: tuple[str, str] | None = None
    series: str | None = None
    kind: str = ""
    note: str = ""
    span: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """groups: (heading, rows); the first cell of a row names it. tops: headings over the columns as (text, columns)."""

    caption: str
    head: tuple[str, ...]
    groups: list[tuple[str, list[list[Cell]]]]
    tops: list[tuple[str, int]] = field(default_factory=list)


NONE = Cell("-")


def number(value: float | None, form: str = ".2f", low: float | None = None, high: float | None = None) -> Cell:
    if value is None:
        return NONE
    ends = None if low is None or high is None else (format(low, form), format(high, form))
    return Cell(format(value, form), value, ends)


def share(value: float | None, digits: int = 1) -> Cell:
    return NONE if value is None else Cell(f"{100 * value:.{digits}f} %", value)


def score(value: float | None, low: float | None, high: float | None, kind: str = "") -> Cell:
    """A number from 0 to 1 with its interval, also drawn."""
    if value is None or low is None or high is None:
        return number(value)
    return Cell(f"{value:.2f}", value, (f"{low:.2f}", f"{high:.2f}"), kind=kind, span=(low, value, high))


def name(method: str, series: str, reached: bool | None = True, note: str | None = "") -> Cell:
    missed = reached is False
    notes = (note, "budget not reached" if missed else "")
    return Cell(method, method, series=series, kind="missed" if missed else "", note="; ".join(filter(None, notes)))


LEADERBOARD = ("method", "of full cache", "mean score", "of full", "difference", "KL mean", "KL p99", "top-1", "time")


def leaderboard(standings: Sequence[Standing], caption: str = "") -> Table:
    """One group per budget, the highest mean score first; controls before all."""
    groups = []
    controls = [s for s in standings if s.series in CONTROLS]
    if controls:
        groups.append(("controls", [standing(s) for s in controls]))
    others = [s for s in standings if s.series not in CONTROLS]
    for target in unique(s.target for s in others):
        groups.append((budget(target), [standing(s) for s in others if s.target == target]))
    return Table(caption, LEADERBOARD, groups)


def standing(s: Standing) -> list[Cell]:
    kl = s.fidelity or {}
    part = f"{s.lines} of {s.all_lines} lines" if s.lines < s.all_lines else ""
    return [
        name(s.method, s.series, s.reached, "; ".join(filter(None, (s.setting, part)))),
        share(s.mean.byte_ratio),
        score(s.mean.score, s.mean.low, s.mean.high),
        share(s.mean.score / s.full if s.full and s.series not in CONTROLS[:1] else None, 0),
        number(s.delta if s.series not in CONTROLS[:1] else None, "+.3f", s.delta_low, s.delta_high),
        number(kl.get("kl_mean"), ".2g", kl.get("kl_low"), kl.get("kl_high")),
        number(kl.get("kl_p99"), ".2g"),
        share(kl.get("top1")),
        number(s.time, ".2f"),
    ]


def matrix(lines: Sequence[dict]) -> Table:
    """Score of every task, length and method of one mode, with a mark where it differs from the full cache's."""
    found = {e["method"]: e for e in reversed(lines)}
    controls = [m for c in CONTROLS for m in found if found[m]["series"] == c]
    columns = [(None, m) for m in controls]
    for t in targets(lines):
        columns += [(t, m) for m in unique(e["method"] for e in lines) if m not in controls and found[m]["target"] == t]
    tops = [("controls", len(controls))] if controls else []
    tops += [(budget(t), sum(m not in controls and u == t for u, m in columns)) for t in targets(lines)]
    by_place = {(e["task"], e["length"], e["method"]): e for e in lines}
    rows = [
        [Cell(task, task), number(length, "d"), *(_changed(by_place.get((task, length, m))) for _, m in columns)]
        for task, length in unique((e["task"], e["length"]) for e in lines)
    ]
    heads = (m if m in controls else found[m]["series"] for _, m in columns)
    return Table("", ("task", "length", *heads), [("", rows)], [("", 2), *tops])


def _changed(line: dict | None) -> Cell:
    """A score, marked where the interval of its difference to the full cache leaves 0 out."""
    if line is None or line["score"] is None:
        return NONE
    low, high = line["delta_low"], line["delta_high"]
    kind = "loss" if high is not None and high < 0 else "gain" if low is not None and low > 0 else "even"
    # that a guess is worse is no finding
    kind = "even" if line["series"] in CONTROLS else kind
    return Cell(f"{line['score']:.2f}", line["score"], kind=kind)


TASK = ("method", "of full cache", "score", "difference", "lost", "won", "p", "B/token", "tokens", "s/token", "time")


def task(lines: Sequence[dict]) -> Table:
    """Everything measured on one task in one mode, a group per length."""
    kinds = " and ".join(unique(e["interval"].capitalize() for e in lines if e["interval"]))
    cases = ", ".join(map(str, unique(e["cases"] for e in lines)))
    lengths = unique(e["length"] for e in lines)
    groups = [("" if n is None else f"{n} tokens", [_task(e) for e in of(lines, length=n)]) for n in lengths]
    return Table(f"{cases} cases a line, {kinds} intervals", TASK, groups)


def _task(e: dict) -> list[Cell]:
    return [
        name(e["method"], e["series"], e["reached"], e["setting"]),
        share(e["byte_ratio"]),
        score(e["score"], e["low"], e["high"]),
        number(e["delta"], "+.2f", e["delta_low"], e["delta_high"]),
        number(e["lost"], "d"),
        number(e["won"], "d"),
        number(e["p"], ".2g"),
        number(e["bytes_per_token"], ".0f"),
        number(e["tokens"], ".0f"),
        number(e["seconds_per_token"], ".4f"),
        number(e["time"], ".2f"),
    ]


FIDELITY = (
    *("method", "of full cache", "KL mean", "median", "p95", "p99", "p99.9", "max", "top-1", "top-5", "RMS of dp"),
    *("NLL difference", "perplexity", "bits/byte", "greedy prefix", "greedy agreement", "read compressed"),
)


def fidelity(rows: Sequence[dict]) -> Table:
    """One mode, chunk and prefix length."""
    first = rows[0]
    how = {1: ", token by token", None: ""}.get(first["chunk"], f", in chunks of {first['chunk']}")
    caption = f"{first['mode']}{how}, length {first['length']}: {first['documents']} documents, "
    caption += f"{first['positions']} positions"
    full = f" (full cache {first['ppl_full']:.3f})" if first["ppl_full"] is not None else ""
    return Table(caption, tuple(f"{h}{full}" if h == "perplexity" else h for h in FIDELITY), _budgets(rows, _fidelity))


def _fidelity(e: dict) -> list[Cell]:
    return [
        name(e["method"], e["series"]),
        share(e["byte_ratio"]),
        number(e["kl_mean"], ".2g", e["kl_low"], e["kl_high"]),
        *(number(e[f"kl_{k}"], ".2g") for k in ("median", "p95", "p99", "p999", "max")),
        share(e["top1"]),
        share(e["top5"]),
        number(e["dp_rms"], ".2g"),
        number(e["dnll"], "+.3f", e["dnll_low"], e["dnll_high"]),
        number(e["ppl"], ".3f"),
        number(e["bits_per_byte"], ".3f"),
        number(e["trajectory_prefix"], ".1f"),
        share(e["trajectory_agreement"]),
        share(e.get("exercised")),
    ]


MEMORY = ("method", "context", "bits a stored number", "held", "of full cache", "peak of a step", "full cache")


def memory(rows: Sequence[dict]) -> Table:
    def cells(e: dict) -> list[Cell]:
        sizes = {k: NONE if e[k] is None else Cell(human(e[k]), e[k]) for k in ("held", "peak", "full")}
        context = number(e["length"], "d")
        bits = NONE if e.get("bits") is None else number(e["bits"], ".2f")  # results before 0.1 have none
        place = [name(e["method"], e["series"]), context, bits]
        return [*place, sizes["held"], share(e["byte_ratio"]), sizes["peak"], sizes["full"]]

    return Table("", MEMORY, _budgets(rows, cells))


LAYERS = ("method", "context", "layer", "keys", "keys after RoPE", "values", "attention output", "its cosine")


def layers(rows: Sequence[dict]) -> Table:
    def cells(e: dict) -> list[Cell]:
        errors = [number(e[k], ".3f") for k in ("key_error", "key_rope_error", "value_error", "output_error")]
        place = [number(e["length"], "d"), number(e["layer"], "d")]
        return [name(e["method"], e["series"]), *place, *errors, number(e["output_cosine"], ".4f")]

    return Table("Relative errors, |x - x'| / |x|", LAYERS, _budgets(rows, cells))


def failures(rows: Sequence[dict]) -> Table:
    cells = [[Cell(e["method"], e["method"]), Cell(e["task"]), _length(e), Cell(e["error"])] for e in rows]
    return Table("", ("method", "task", "length", "error"), [("", cells)])


def skipped(rows: Sequence[dict]) -> Table:
    cells = [[Cell(e["task"], e["task"]), _length(e), Cell(e["reason"])] for e in rows]
    return Table("", ("task", "length", "why it was left out"), [("", cells)])


def settings(values: dict) -> Table:
    """All settings; what is nested gets a line of its own."""
    flat: list[tuple[str, object]] = []
    for key, value in values.items():
        flat += [(f"{key}: {k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    rows = [[Cell(key), Cell(", ".join(map(str, v)) if isinstance(v, list) else str(v))] for key, v in flat]
    return Table("", ("setting", "value"), [("", rows)])


def _length(entry: dict) -> Cell:
    return number(entry["length"], "d")


def _budgets(rows: Sequence[dict], cells) -> list[tuple[str, list[list[Cell]]]]:
    """Rows by budget, controls first."""
    controls = [e for e in rows if e["series"] in CONTROLS]
    groups: Iterable = [("controls", controls), *((budget(t), of_target(rows, t)) for t in targets(rows))]
    return [(title, [cells(e) for e in group]) for title, group in groups if group]


def of_target(rows: Sequence[dict], target: float | None) -> list[dict]:
    return [e for e in of(rows, target=target) if e["series"] not in CONTROLS]
