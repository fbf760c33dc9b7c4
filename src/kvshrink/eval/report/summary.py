"""Outcomes to the lines of a table: score and interval, real bytes, time, and the comparison with the full cache."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.eval.run.outcomes import Outcome
from kvshrink.eval.run.stats import bootstrap, paired, wilson

SEED = 0  # of bootstrap resamples


@dataclass(frozen=True)
class Against:
    """A method beside the full cache on the same samples.

    lost, won: samples right with the full cache and wrong here, and the other way round (right: score of .5 or more).
    delta:     mean difference of the scores, with its 95 % paired bootstrap interval.
    p:         exact McNemar test, where scores are 0 or 1 and every sample has a context of its own.
    time:      median over samples of the time per token, as a multiple of the full cache's in the same run.
    """

    lost: int
    won: int
    delta: float
    delta_low: float
    delta_high: float
    p: float | None
    time: float


@dataclass(frozen=True)
class Line:
    """One method on one task, in one mode, at one length.

    low, high: 95 % interval of the mean score: Wilson where scores are 0 or 1, else bootstrap. A context with several
               questions counts once, by their mean.
    encode:    median seconds to compress the context.
    byte_ratio:      mean over samples of bytes held / full. target, reached and setting as in Entry.
    """

    task: str
    mode: str
    length: int
    method: str
    series: str
    target: float | None
    reached: bool
    setting: str
    cases: int
    score: float
    low: float
    high: float
    interval: str
    byte_ratio: float
    bytes_per_token: float
    tokens: float
    seconds_per_token: float
    encode: float
    against: Against | None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        row = asdict(self) | {"removed": 1 - self.byte_ratio, "x_factor": 1 / self.byte_ratio}
        row |= row.pop("against") or dict.fromkeys(Against.__dataclass_fields__)
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def summarise(outcomes: Sequence[Outcome], entries: Sequence[Entry] = ()) -> list[Line]:
    """One line per task, mode, length and method, in order of first appearance."""
    known = {e.label: e for e in entries}
    tasks: dict[tuple[str, str, int], dict[str, list[Outcome]]] = {}
    for o in outcomes:
        tasks.setdefault((o.task, o.mode, o.length), {}).setdefault(o.method, []).append(o)
    return [
        _line(group, known.get(method, Entry(method, None)), methods.get(FULL))
        for methods in tasks.values()
        for method, group in methods.items()
    ]


def _line(group: list[Outcome], entry: Entry, full: list[Outcome] | None) -> Line:
    scores = [o.score for o in group]
    low, high, interval = _interval(scores, group)
    first = group[0]
    return Line(
        task=first.task,
        mode=first.mode,
        length=first.length,
        method=first.method,
        series=entry.series or first.method,
        target=entry.target,
        reached=entry.reached,
        setting=entry.setting,
        cases=len(group),
        score=mean(scores),
        low=low,
        high=high,
        interval=interval,
        byte_ratio=mean(o.byte_ratio for o in group),
        bytes_per_token=mean(o.nbytes / o.tokens for o in group),
        tokens=mean(o.tokens for o in group),
        seconds_per_token=median(o.seconds for o in group),
        encode=median(o.encode for o in group),
        against=None if full is None or first.method == FULL else _against(group, full),
    )


def _against(group: list[Outcome], full: list[Outcome]) -> Against | None:
    by_index = {o.index: o for o in full}
    pairs = [(o, by_index[o.index]) for o in group if o.index in by_index]
    if not pairs:
        return None
    ours, theirs = [o.score for o, _ in pairs], [f.score for _, f in pairs]
    deltas = [a - b for a, b in zip(ours, theirs, strict=True)]
    clusters = _clusters(deltas, [o for o, _ in pairs])
    low, high = bootstrap(clusters or deltas, SEED)
    binary = {*ours, *theirs} <= {0.0, 1.0} and not clusters
    return Against(
        lost=sum(o.score < 0.5 <= f.score for o, f in pairs),
        won=sum(f.score < 0.5 <= o.score for o, f in pairs),
        delta=mean(deltas),
        delta_low=low,
        delta_high=high,
        p=paired(ours, theirs).p if binary else None,
        time=median(o.seconds / f.seconds for o, f in pairs),
    )


def _interval(scores: list[float], group: list[Outcome]) -> tuple[float, float, str]:
    """(low, high, kind) of the mean score."""
    # a context with several questions counts once: they stand and fall together
    parts = _clusters(scores, group) or scores
    if set(scores) <= {0.0, 1.0}:
        return *wilson(sum(parts), len(parts)), "wilson"
    return *bootstrap(parts, SEED), "bootstrap"


def _clusters(values: list[float], group: list[Outcome]) -> list[float]:
    """Mean value of each context, if contexts have several questions; else nothing."""
    by_context: dict[int, list[float]] = {}
    for value, outcome in zip(values, group, strict=True):
        by_context.setdefault(outcome.context, []).append(value)
    means = [mean(v) for v in by_context.values()]
    return means if 1 < len(means) < len(values) else []


HEAD = ("task", "method", "cases", "score", "95 % interval", "of full cache", "bytes/token", "lost/won")


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, in the order of HEAD. lost/won: answers that flipped against the full cache."""
    return (
        line.task,
        line.method,
        str(line.cases),
        f"{line.score:.2f}",
        f"{line.low:.2f}-{line.high:.2f}",
        f"{100 * line.byte_ratio:.1f} %",
        f"{line.bytes_per_token:.0f}",
        "" if line.against is None else f"{line.against.lost}/{line.against.won}",
    )
