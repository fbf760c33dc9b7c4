import pytest

from kvshrink.errors import EvalError
from kvshrink.eval.run.stats import Paired, bootstrap, paired, student, wilson


def test_wilson_by_hand():
    # p = .5, n = 10, z = 2: middle .5 + .2 = .7, half 2 sqrt(.025 + .01) = .3741657, scale 1.4
    low, high = wilson(5, 10, z=2)
    assert low == pytest.approx((0.7 - 0.3741657) / 1.4, abs=1e-7)
    assert high == pytest.approx((0.7 + 0.3741657) / 1.4, abs=1e-7)


def test_wilson_of_a_longeval_row():
    # 47 of 50 right, the interval that a table of LongEval scores should print beside .94
    assert wilson(47, 50) == pytest.approx((0.8378, 0.9794), abs=1e-4)


@pytest.mark.parametrize("n", [1, 3, 50, 1000])
def test_wilson_laws(n):
    for hits in range(n + 1):
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        assert low < high
        mirrored = wilson(n - hits, n)
        assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_wilson_narrows_with_more_samples():
    widths = [high - low for low, high in (wilson(9 * k, 10 * k) for k in (1, 5, 50))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(hits, n):
    with pytest.raises(EvalError, match=f"{hits} hits of {n}"):
        wilson(hits, n)


def test_paired_by_hand():
    a = [1, 1, 1, 1, 1, 1, 0, 0, 1]
    b = [0, 0, 0, 0, 0, 1, 1, 0, 1]
    # 5 against 1 of d = 6: 2 (C(6,0) + C(6,1)) / 64 = 14 / 64
    assert paired(a, b) == Paired(both=2, only_a=5, only_b=1, neither=1, p=14 / 64)


def test_paired_laws():
    a, b = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    ab, ba = paired(a, b), paired(b, a)
    assert (ab.only_a, ab.only_b, ab.p) == (ba.only_b, ba.only_a, ba.p)
    assert ab.both + ab.only_a + ab.only_b + ab.neither == 6
    assert ab.p == 2 / 16
    assert paired(a, a).p == 1
    assert paired([1, 0], [0, 1]).p == 1
    assert paired([1] * 2000, [0] * 2000).p < 1e-300


def test_paired_refuses_what_it_cannot_pair():
    with pytest.raises(EvalError, match="2 and 1 outcomes"):
        paired([1, 0], [1])
    with pytest.raises(EvalError, match=r"not 0 or 1, the first is 0\.5"):
        paired([1, 0.5], [1, 0])


def test_bootstrap_covers_the_mean_and_repeats():
    values = [0.0] * 20 + [1.0] * 30
    low, high = bootstrap(values, seed=3)
    assert (low, high) == bootstrap(values, seed=3)
    assert (low, high) != bootstrap(values, seed=4)
    # normal approximation: .6 -+ 1.96 sqrt(.24 / 50) = .464 and .736
    assert low == pytest.approx(0.464, abs=0.03)
    assert high == pytest.approx(0.736, abs=0.03)


def test_bootstrap_of_a_constant_is_the_constant():
    assert bootstrap([2.5] * 7, seed=0) == (2.5, 2.5)


def test_bootstrap_shifts_and_scales_with_the_values():
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    low, high = bootstrap(values, seed=1, n=200)
    assert bootstrap([3 * v - 1 for v in values], seed=1, n=200) == pytest.approx((3 * low - 1, 3 * high - 1))


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_refuses_no_or_bad_values(values):
    with pytest.raises(EvalError, match="bootstrap"):
        bootstrap(values, seed=0)


def test_bootstrap_refuses_no_resamples():
    with pytest.raises(EvalError, match="0 resamples"):
        bootstrap([1.0], seed=0, n=0)


def test_student_by_hand_and_in_the_limit():
    # mean 2.5, deviation sqrt(5/3), t(3) = 3.182
    assert student([1, 2, 3, 4]) == pytest.approx((2.5 - 3.182 * (5 / 3) ** 0.5 / 2, 2.5 + 3.182 * (5 / 3) ** 0.5 / 2))
    many = [0.0, 1.0] * 200
    assert student(many) == pytest.approx(bootstrap(many, seed=0), abs=0.01)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("inf")]])
def test_student_needs_two_finite_values(values):
    with pytest.raises(EvalError, match="student"):
        student(values)
