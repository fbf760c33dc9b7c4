"""What every task needs: the random source and depth of one sample, filling a length, and refusing settings."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample

# reference: what the bundled reference model was trained on; official: what the benchmark's own repository asks
WORDINGS = ("reference", "official")


def rng(task: str, seed: int, index: int) -> random.Random:
    """The random source of sample `index`. It depends on nothing else, so a longer run repeats a shorter one."""
    return random.Random(f"{task}/{seed}/{index}")


def depth(index: int) -> float:
    """Where sample `index` hides its answer: 0, 1, 1/2, 1/4, 3/4, 1/8, 5/8, ...

    The two ends, then the base-2 van der Corput sequence: the first n depths are evenly spread for every n
    (exactly, for n = 3, 5, 9, 17, ...), and the depth of a sample does not depend on n.
    """
    if index < 2:
        return float(index)
    bits = f"{index - 1:b}"
    return int(bits[::-1], 2) / 2 ** len(bits)


def places(size: int, depths: Sequence[float]) -> list[int]:
    """Distinct positions from 0 to size - 1 at these depths: the next free one if an earlier depth has taken it."""
    taken: list[int] = []
    for share in depths:
        at = round(share * (size - 1))
        while at in taken:
            at = (at + 1) % size
        taken.append(at)
    return taken


def check_count(task: str, n: int) -> None:
    """Raises EvalError unless at least one sample is asked for."""
    if n < 1:
        raise EvalError(f"{task}: {n} samples asked. Ask for at least 1.")


def check_known(task: str, setting: str, value: str, known: Sequence[str]) -> None:
    """Raises EvalError listing the known values unless the setting has one of them."""
    if value not in known:
        raise EvalError(f"{task}: no {setting} {value!r}. Known: {', '.join(known)}.")


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest n from low to high for which fits(n), or low - 1: bisection, fits must be true up to some n."""
    low, n = low - 1, low
    # doubling first, so that no text is made that is more than twice too long
    while n <= high and fits(n):
        low, n = n, 2 * n + 1
    high = min(high, n - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fits(samples: Sequence[Sample], tokens: int, count: Count) -> bool:
    """Whether bos, the context that the samples share and the longest question with its answer fit into `tokens`."""
    longest = max(count(s.question + s.answer_prefix) + s.max_new_tokens for s in samples)
    return 1 + count(samples[0].context) + longest <= tokens


def fill(
    task: str,
    make: Callable[[int], list[Sample]],
    low: int,
    high: int,
    unit: str,
    tokens: int,
    count: Count,
    remedy: str = "",
) -> list[Sample]:
    """make(size), the questions on one context, for the largest size below `high` that fits into `tokens`.

    unit: what a size counts. meta gets `length`, the tokens that are filled.

    Raises EvalError if size `low` does not fit, or `high` fits as well.
    """
    size = largest(low, high, lambda k: fits(make(k), tokens, count))
    if size < low:
        raise EvalError(f"{task}: tokens={tokens} leaves no room for {low} {unit}. Raise tokens.")
    if size == high:
        raise EvalError(f"{task}: {high} {unit} do not fill tokens={tokens}. Lower tokens{remedy}.")
    return [replace(s, meta=s.meta | {"length": tokens}) for s in make(size)]
