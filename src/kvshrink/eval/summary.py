"""Outcomes to the plain table that users read: method, accuracy, kept fraction in real bytes, bytes per token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kvshrink.eval.runner import Outcome
from kvshrink.eval.stats import wilson


@dataclass(frozen=True)
class Line:
    """One method on one task. low and high: 95 % Wilson interval; kept: mean over samples of bytes held / full."""

    task: str
    method: str
    cases: int
    accuracy: float
    low: float
    high: float
    kept: float
    bytes_per_token: float
    tokens: float
    seconds: float

    def to_dict(self) -> dict:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def summarise(outcomes: Sequence[Outcome]) -> list[Line]:
    """One line per task and method, in order of first appearance."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.task, o.method), []).append(o)
    lines = []
    for (task, method), group in groups.items():
        n, hits = len(group), sum(o.score for o in group)
        low, high = wilson(int(hits), n)
        lines.append(
            Line(
                task=task,
                method=method,
                cases=n,
                accuracy=hits / n,
                low=low,
                high=high,
                kept=sum(o.kept for o in group) / n,
                bytes_per_token=sum(o.nbytes / o.tokens for o in group) / n,
                tokens=sum(o.tokens for o in group) / n,
                seconds=sum(o.seconds for o in group) / n,
            )
        )
    return lines


HEAD = ("task", "method", "cases", "accuracy", "95 % interval", "kept", "bytes/token")


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, in the order of HEAD."""
    interval = f"{line.low:.2f}-{line.high:.2f}"
    kept = f"{100 * line.kept:.1f} %"
    return (
        line.task,
        line.method,
        str(line.cases),
        f"{line.accuracy:.2f}",
        interval,
        kept,
        f"{line.bytes_per_token:.0f}",
    )


def markdown(lines: Sequence[Line]) -> str:
    """A Markdown table."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(cells(line) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
