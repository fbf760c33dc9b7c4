"""What a loss in one operand costs the model at the points of a curve: at a few measured as KL, between them estimated.

An operand is one layer's keys or values. Between two points that are measured KL is taken to be a power of the expected
squared error, below the last one proportional to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvshrink.methods.lowrank import _bits

# of a curve are measured: the first point, and the first with no more expected error to the variance than each of these
MEASURED = {2: (0.2,), 3: (0.3, 0.05), 4: (0.3, 0.1, 0.03)}
LOSSES = 128  # measured in a fit, where two for each operand are no more
NOTHING = 1e-9  # nats; a KL of less is taken as this


class Point(NamedTuple):
    """Bytes of a page, the setting that takes them, and the expected squared error over the variance."""

    size: int
    setting: Any
    error: float


def losses_each(operands: int) -> int:
    """How many points of each operand's curve are measured."""
    return min(max(MEASURED), max(min(MEASURED), LOSSES // operands))


def curve(points: Sequence[Point], kl: Callable[[Point], float], count: int) -> _bits.Curve:
    """(bytes of a page, KL) at the points, most bytes last. kl: measures; `count` of them are."""
    last = len(points) - 1
    near = {next((n for n, p in enumerate(points) if p.error <= most), last) for most in MEASURED[count]}
    known = [(points[n].error, max(NOTHING, kl(points[n]))) for n in sorted({0, *near})]
    return [(p.size, _bits.between(known, p.error)) for p in points]
