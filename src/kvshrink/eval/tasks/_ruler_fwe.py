"""RULER's frequent words (fwe): the three most frequent coded words of a text, after the dots.

Word number k stands int(n k^-2 / zeta(2)) times; number 1 is "...", numbers 2 to 4 are the answers.
Differs from upstream: the answer's tokens count towards the length, and no text is so short that number 5 stands as
often as number 4.
"""

from collections.abc import Sequence
from math import pi
from random import Random
from string import ascii_lowercase

from kvshrink.eval.tasks import Count, Sample
from kvshrink.eval.tasks._ruler_draft import Draft

ZETA = pi**2 / 6
LETTERS = 6
TOKENS_PER_WORD = 50  # distinct words are one for this many tokens of the prompt
SHORTEST = 74  # n (1/16 - 1/25) / ZETA is over 1 from here on, so numbers 4 and 5 always differ
MAX_NEW_TOKENS = 50


def draft(random: Random, tokens: int, count: Count) -> Draft:
    """A sample whose units are n of the law above, a little more than the words of the text."""
    coded: dict[str, None] = {}
    while len(coded) < tokens // TOKENS_PER_WORD:
        coded["".join(random.choices(ascii_lowercase, k=LETTERS))] = None
    ranked, order = ["...", *list(coded)[1:]], random.random()

    def make(n: int) -> Sample:
        text = [word for word, times in zip(ranked, counts(n, len(ranked)), strict=True) for _ in range(times)]
        Random(order).shuffle(text)
        return Sample(*prompt(text), tuple(ranked[1:4]), "string_match_all", MAX_NEW_TOKENS, {})

    return Draft("words", SHORTEST, 2 * tokens, make)


def counts(n: int, distinct: int) -> list[int]:
    """How often each of the ranked words stands in the text."""
    return [int(n * k**-2 / ZETA) for k in range(1, distinct + 1)]


def prompt(text: Sequence[str]) -> tuple[str, str, str]:
    """(context, question, answer prefix)."""
    return (
        "Read the following coded text and track the frequency of each coded word. "
        f"Find the three most frequently appeared coded words. {' '.join(text)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    )
