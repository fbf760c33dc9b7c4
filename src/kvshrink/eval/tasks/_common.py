"""What every task needs: the random source and depth of one sample, and reading a number out of an answer."""

import random
import re

from kvshrink.errors import EvalError


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


def check_count(task: str, n: int) -> None:
    """Raises EvalError unless at least one sample is asked for."""
    if n < 1:
        raise EvalError(f"{task}: {n} samples asked. Ask for at least 1.")


def leading_digits(text: str) -> str:
    """The output up to the first character that is not a digit: "4244>, line" -> "4244"."""
    found = re.match("[0-9]+", text)
    return found[0] if found else ""


def first_integer(text: str) -> int | None:
    """The first run of digits anywhere in the text, or None."""
    found = re.search("[0-9]+", text)
    return int(found[0]) if found else None


def last_integer(text: str) -> int | None:
    """The last run of digits anywhere in the text, or None."""
    found = re.findall("[0-9]+", text)
    return int(found[-1]) if found else None
