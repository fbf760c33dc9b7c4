"""How sure a measured score is: intervals for one run, and a test for two runs on the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import final

import numpy as np

from kvshrink.errors import EvalError


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of the share hits / n; z = 1.96 is 95 %.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212. With p = hits / n:

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Unlike p -+ z sqrt(p (1 - p) / n) it stays inside [0, 1] and has a width at 0 and n hits.
    """
    if n < 1 or not 0 <= hits <= n:
        raise EvalError(f"wilson: {hits} hits of {n}. Hits must be from 0 to n, and n at least 1.")
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # rounding may leave the ends a hair outside
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@final
@dataclass(frozen=True)
class Paired:
    """Counts of two runs on the same samples. p: how likely so uneven a split of only_a and only_b is by chance."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Exact two-sided McNemar test of two lists of 0/1 outcomes: the sign test on the samples that differ.

    Source: McNemar, Psychometrika 12 (1947), 153-157, with the binomial in place of chi-square.
    With d = only_a + only_b and k the smaller of the two: p = min(1, 2 sum_{i<=k} C(d, i) / 2^d).
    """
    if len(a) != len(b):
        raise EvalError(f"paired: {len(a)} and {len(b)} outcomes. Compare two runs on the same samples.")
    odd = [x for x in (*a, *b) if x not in (0, 1)]
    if odd:
        raise EvalError(f"paired: {len(odd)} outcomes are not 0 or 1, the first is {odd[0]}. Use bootstrap for scores.")
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    d = only_a + only_b
    tail = sum(comb(d, i) for i in range(min(only_a, only_b) + 1))
    return Paired(pairs.count((True, True)), only_a, only_b, pairs.count((False, False)), min(1.0, 2 * tail / 2**d))


# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; for few values, where a percentile bootstrap is far too narrow."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size < 2 or not np.isfinite(x).all():
        raise EvalError(
            f"student: {x.size} values, {int(np.isfinite(x).sum())} finite. Give two or more finite numbers."
        )
    half = (T95[x.size - 2] if x.size - 1 <= len(T95) else 1.96) * float(x.std(ddof=1)) / sqrt(x.size)
    return float(x.mean()) - half, float(x.mean()) + half


def bootstrap(values: Sequence[float], seed: int, n: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values`, from n resamples.

    Source: Efron, Ann. Stat. 7 (1979), 1-26. For two runs on the same samples give the differences.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise EvalError(
            f"bootstrap: {x.size} values, {int(np.isfinite(x).sum())} finite. Give one or more finite numbers."
        )
    if n < 1:
        raise EvalError(f"bootstrap: {n} resamples. Use at least 1, better 1000.")
    rng = np.random.default_rng(seed)
    # one resample at a time keeps memory at one copy of the values
    means = [x[rng.integers(0, x.size, x.size)].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
