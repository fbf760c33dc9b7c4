"""A RULER sample that is still free in length: its words are drawn, how much of the haystack it shows is not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from kvshrink.eval.tasks import Sample


@final
@dataclass(frozen=True)
class Draft:
    """make(n) is the sample with n units of haystack, low <= n <= high. More of them make a longer prompt.

    high is what there is of them, or more than any tokenizer gets into the tokens asked.
    """

    units: str
    low: int
    high: int
    make: Callable[[int], Sample]
