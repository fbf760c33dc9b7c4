"""Bytes of all operands from their parts of one KL: the optimum of a model that is known, and the bounds."""

import math

import pytest

from kvshrink.methods._stats import Parts, Probe
from kvshrink.methods.lowrank._balance import ROUNDS, Point, balanced, by_kl, spent

COSTS = {(0, "key"): 1.0, (0, "value"): 0.05, (1, "key"): 0.4, (1, "value"): 3.0}
RATE = 0.01  # of an error's logarithm, a byte


def points(most=1000):
    """Errors that fall by the same share with every byte."""
    return {at: [Point(size, None, math.exp(-RATE * size)) for size in range(0, most + 1, 50)] for at in COSTS}


def parts(given, turn):
    """Of a KL that is the sum of errors, each at its cost."""
    lost = {at: COSTS[at] * math.exp(-RATE * size) for at, size in given.items()}
    return Parts(kl(given), {at: x / kl(given) for at, x in lost.items()})


def kl(given):
    return sum(COSTS[at] * math.exp(-RATE * size) for at, size in given.items())


def test_bytes_are_those_of_the_optimum():
    """Where the next byte is worth the same everywhere: c exp(-rate b) alike, b = log(c) / rate + a constant."""
    budget = 1200
    mean = sum(map(math.log, COSTS.values())) / len(COSTS)
    best = {at: budget / 4 + (math.log(c) - mean) / RATE for at, c in COSTS.items()}
    assert min(best.values()) > 0
    found, lost = balanced(points(), budget, parts, 60)
    assert lost == pytest.approx(kl(found), rel=0.1)
    assert sum(found.values()) == pytest.approx(budget, rel=1e-6)
    assert kl(found) <= 1.01 * kl(best)
    assert kl(found) < 0.6 * kl(dict.fromkeys(COSTS, budget / 4)), "and not those of all alike"
    few, _ = balanced(points(), budget, parts, 16)
    assert kl(few) < 1.1 * kl(best), "nearly so in as many rounds as a fit takes"


def test_noise_moves_bytes_but_not_away_from_the_optimum():
    noise = [1.6, 0.6, 1.0, 0.3, 2.0]

    def noisy(given, turn):
        whole, of = parts(given, turn)
        return Parts(whole, {at: x * noise[(turn + n) % 5] for n, (at, x) in enumerate(of.items())})

    (exact, _), (found, _) = balanced(points(), 1200, parts, 16), balanced(points(), 1200, noisy, 16)
    assert kl(found) < 1.15 * kl(exact)


@pytest.mark.parametrize("worthless", [0.0, -0.3, 1e-12])
def test_an_operand_that_costs_nothing_keeps_little_and_takes_no_logarithm(worthless):
    def mostly(given, turn):
        whole, of = parts(given, turn)
        return Parts(whole, of | {(0, "value"): worthless})

    found, _ = balanced(points(), 1200, mostly, 16)
    assert found[0, "value"] < 60
    assert sum(found.values()) == pytest.approx(1200, rel=1e-6)


@pytest.mark.parametrize("budget", [1, 40, 4000, 9000])
def test_bounds_are_kept(budget):
    found, _ = balanced(points(), budget, parts, 8)
    least = min(25, budget / 4)  # half of the first step, or what there is
    assert all(0.999 * least <= size <= 1000 for size in found.values()), "and the last point"
    assert sum(found.values()) == pytest.approx(min(budget, 4000), rel=1e-6)


def test_what_one_cannot_use_the_next_may():
    given = {(0, "key"): 70.0, (0, "value"): 50.0}
    taken, left = spent(given, 130, lambda at, room: (at[1], int(room) // 40 * 40))
    assert taken == {(0, "key"): "key", (0, "value"): "value"}
    assert left == 10  # 80 and 40 of 130


def test_operands_of_one_point_or_without_error_are_no_obstacle():
    odd = points() | {(2, "key"): [Point(30, None, 0.5)], (2, "value"): [Point(0, None, 0.0), Point(10, None, 0.0)]}
    found, _ = balanced(odd, 1200, lambda given, turn: Parts(1.0, dict.fromkeys(given, 0.2)), 16)
    assert found[2, "key"] == pytest.approx(30)
    assert sum(found.values()) == pytest.approx(1200, rel=1e-6)


class Told(Probe):
    """Says what `parts` does, `scale` times."""

    def __init__(self, scale: float) -> None:
        self.scale, self.asked = scale, 0

    def parts(self, codecs, turn):
        self.asked += 1
        whole, of = parts(codecs, turn)
        return Parts(self.scale * whole, of)

    def near(self, budget):
        return budget

    def once(self, key, measure):
        return measure()

    def kl(self, codecs):
        raise AssertionError

    @property
    def tokens(self):
        raise AssertionError("nor are tokens judged")

    def fisher(self):
        raise AssertionError


def test_a_budget_that_loses_most_says_so(caplog):
    least = kl(balanced(points(), 1200, parts, 16)[0])
    by_kl(Told(0.9 / least), "key", points(), 1200, lambda given: given)
    assert "predictions are 0.9 nats from the full cache's" in caplog.text
    caplog.clear()
    probe = Told(0.4 / least)
    given, lost = by_kl(probe, "key", points(), 1200, lambda given: given)
    assert not caplog.text
    assert lost == pytest.approx(0.4, rel=0.1)
    assert sum(given.values()) == pytest.approx(1200, rel=1e-6)
    assert probe.asked == ROUNDS
