"""One byte budget for the keys and values of all layers, until a byte more would be worth the same to each.

What a byte is worth is measured where it is spent, with all layers lossy at once: losses of several layers are not the
sum of what each costs by itself, least of all where bits are few. In each round every operand's part of the KL is
measured (Probe.parts) and bytes move towards those of which the next byte takes most of it away; each round asks other
rows, moves less than the one before, and the mean of the later ones is the answer.
"""

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from kvshrink.methods._codec import Codec
from kvshrink.methods._stats import KV, Parts, Probe
from kvshrink.methods.lowrank import _bits

log = logging.getLogger("kvshrink")
At = tuple[int, KV]  # a layer's keys or values
Bytes = dict[At, float]  # of a page
Setting = TypeVar("Setting")
ROUNDS, ROUGH = 16, 6  # as many as a fit takes, and a search
STEP, SLOWER = 0.4, 4  # power of the worth by which bytes move, halved after so many rounds
MOST = 0.7  # change of a byte count's logarithm in a round
SMALLEST = 2e-4  # part of the KL: a smaller one, or one below 0, is noise
LOST = 0.5  # nats, above which it is told
NOTHING = 1e-9  # an error, or a fall, that has no logarithm worth the name


class Point(NamedTuple):
    """Bytes of a page, the setting that takes them, and the expected squared error over the variance."""

    size: int
    setting: Any
    error: float


def by_kl(
    probe: Probe,
    key: Hashable,
    points: Mapping[At, Sequence[Point]],
    budget: int,
    codecs: Callable[[Mapping[At, float]], Mapping[int, tuple[Codec, Codec]]],
) -> tuple[Bytes, float]:
    """(bytes of each operand, KL there), as the probe finds them at this budget or, where it may be rough, at one near
    it. Logs a warning where the KL is so large that the cache is of little use.

    key: of what the answer depends on, beside the budget. codecs: of each layer, at these bytes of each operand.
    """
    least, most = (sum(own[n].size for own in points.values()) for n in (0, -1))
    near = int(probe.near(budget))
    about, rounds = min(most, max(least, near)), ROUNDS if near == budget else ROUGH

    def search() -> tuple[Bytes, float]:
        return balanced(points, about, lambda given, turn: probe.parts(codecs(given), turn), rounds)

    given, kl = probe.once((key, about), search)
    if kl > LOST and near == budget:
        log.warning(
            "with so few bytes the predictions are %.1f nats from the full cache's on the calibration text. Give a "
            "larger budget, or take a method that needs less.",
            kl,
        )
    return {at: size * budget / about for at, size in given.items()}, kl


def balanced(
    points: Mapping[At, Sequence[Point]],
    budget: int,
    parts: Callable[[Bytes, int], Parts],
    rounds: int,
) -> tuple[Bytes, float]:
    """(bytes of each operand, `budget` in all; KL as the later rounds have it).

    points: some of each operand's, the fewest bytes first.
    parts: measures, at these bytes of each operand in the n-th round, its part of the KL over the whole.
    """
    least = {at: own[0].size or own[min(1, len(own) - 1)].size / 2 or 1.0 for at, own in points.items()}
    least = {at: size * min(1.0, budget / sum(least.values())) for at, size in least.items()}
    most = {at: max(own[-1].size, least[at]) for at, own in points.items()}
    given, later, lost = _scaled(_start(points, budget), budget, least, most), [], []
    for n in range(rounds):
        kl, of = parts(given, n)
        worth = {at: math.log(max(of[at], SMALLEST) * _fall(own, given[at])) for at, own in points.items()}
        mean = sum(given[at] * worth[at] for at in points) / sum(given.values())
        step = STEP / (1 + n / SLOWER)
        moved = {at: size * math.exp(_within(step * (worth[at] - mean))) for at, size in given.items()}
        given = _scaled(moved, budget, least, most)
        if n >= rounds // 2:
            later.append(given)
            lost.append(kl)
    logs = {at: sum(math.log(one[at]) for one in later) / len(later) for at in points} if later else {}
    given = _scaled({at: math.exp(x) for at, x in logs.items()} or given, budget, least, most)
    return given, sum(lost) / max(1, len(lost))


def spent(
    given: Mapping[At, float], budget: int, take: Callable[[At, float], tuple[Setting, int]]
) -> tuple[dict[At, Setting], int]:
    """(what each operand takes of its bytes, bytes that are left): what one cannot use up, the next may.

    take: the setting for so many bytes, and what it really takes.
    """
    taken, left = {}, float(budget - sum(given.values()))
    for at in sorted(given, key=lambda at: -given[at]):
        taken[at], size = take(at, given[at] + left)
        left += given[at] - size
    return taken, int(left)


def _start(points: Mapping[At, Sequence[Point]], budget: int) -> Bytes:
    """Between what relative errors alone would give and the same for each."""
    by_error = _bits.share({at: [(p.size, p.error) for p in own] for at, own in points.items()}, budget)
    return {at: math.sqrt(max(1, by_error[at]) * budget / len(points)) for at in points}


def _scaled(given: Bytes, budget: int, least: Mapping[At, float], most: Mapping[At, float]) -> Bytes:
    """In proportion, to the budget, each within its bounds."""
    low, high = 0.0, 2.0 * budget / min(given.values())

    def at(factor: float) -> Bytes:
        return {k: min(most[k], max(least[k], factor * size)) for k, size in given.items()}

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < budget else (low, middle)
    return at(low)


def _fall(own: Sequence[Point], size: float) -> float:
    """How much the error's logarithm falls with a byte more, between the points about this size."""
    n = max(1, min(len(own) - 1, sum(p.size <= size for p in own)))
    if len(own) <= n:
        return NOTHING
    ratio = max(own[n - 1].error, NOTHING) / max(own[n].error, NOTHING)
    return max(NOTHING, math.log(ratio) / (own[n].size - own[n - 1].size))


def _within(step: float) -> float:
    return max(-MOST, min(MOST, step))
