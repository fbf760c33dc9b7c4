"""RULER's variable tracking (vt): a value handed on through five variables, their statements scattered in noise.

A solved example with shorter names comes first. Differs from upstream: the example's statements stand in other places
in each sample instead of the same ones, and no two names of a chain are the same.
The official wording had "assgined" in the answer prefix until it was mended; older result tables were made with it.
"""

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from kvshrink.eval.tasks import Count, Sample
from kvshrink.eval.tasks._common import largest
from kvshrink.eval.tasks._ruler_draft import Draft
from kvshrink.eval.tasks._ruler_niah import NOISE, SHORTEST_LINE

NAMES = 5  # one chain of four hops
EXAMPLE_TOKENS = 500
MAX_NEW_TOKENS = 30


def draft(random: Random, tokens: int, count: Count) -> Draft:
    """A sample whose units are lines of noise. The example has as many as fit into 500 tokens, and at least 5."""
    example = _solved(random, count)
    names, value, places = _names(random, 5), _value(random), random.random()

    def make(n: int) -> Sample:
        context, question, answer_prefix = prompt(scatter(chain(names, value), n, Random(places)), value)
        return Sample(example + context, question, answer_prefix, tuple(names), "string_match_all", MAX_NEW_TOKENS, {})

    return Draft("lines of noise", NAMES, tokens // SHORTEST_LINE, make)


def chain(names: Sequence[str], value: str) -> list[str]:
    """The statements, in order. All but the first end in a space, as upstream."""
    hops = [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *hops]


def scatter(statements: Sequence[str], n: int, random: Random) -> str:
    """The statements, in their order, before different ones of n lines of noise."""
    before = dict(zip(sorted(random.sample(range(n), len(statements))), statements, strict=True))
    return "\n".join(line for i in range(n) for line in ([before[i]] if i in before else []) + [NOISE])


def prompt(lines: str, value: str) -> tuple[str, str, str]:
    """(context, question, answer prefix)."""
    return (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{lines}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{NAMES} variables are assigned the value {value}, they are: ",
    )


def solved(lines: str, value: str, names: Sequence[str]) -> str:
    """The example with its answer. Two spaces before the answer are upstream's."""
    return "".join(prompt(lines, value)) + " " + " ".join(names) + "\n\n"


def _solved(random: Random, count: Count) -> str:
    names, value, places = _names(random, 3), _value(random), random.random()

    def example(n: int) -> str:
        return solved(scatter(chain(names, value), n, Random(places)), value, names)

    lines = largest(NAMES, EXAMPLE_TOKENS // SHORTEST_LINE, lambda n: count(example(n)) <= EXAMPLE_TOKENS)
    return example(max(NAMES, lines))


def _names(random: Random, letters: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < NAMES:
        found["".join(random.choices(ascii_uppercase, k=letters))] = None
    return list(found)


def _value(random: Random) -> str:
    return str(random.randrange(10000, 99999))
