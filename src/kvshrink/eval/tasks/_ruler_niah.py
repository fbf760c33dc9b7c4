"""RULER's eight needle tasks (niah): values of the asked keys, hidden in a haystack.

Differs from upstream: no two keys and no two values of a prompt are the same, so each question has one right answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, final
from uuid import UUID

from kvshrink.eval.tasks import Sample, _ruler_essay
from kvshrink.eval.tasks._ruler_draft import Draft
from kvshrink.eval.tasks._ruler_words import pair

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SHORTEST_LINE = 8  # tokens, fewer than a line of noise or a needle has with any tokenizer
MAX_NEW_TOKENS = 128


@final
@dataclass(frozen=True)
class Kind:
    """haystack: noise, needle (more needles, all of other keys) or essay. Of the `keys` hidden keys `asked` are asked
    for, each of which has `each` values."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    each: int = 1
    asked: int = 1


TASKS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", value="uuids"),
    "niah_multikey_1": Kind("essay", keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", key="uuids", value="uuids"),
    "niah_multivalue": Kind("essay", each=4),
    "niah_multiquery": Kind("essay", keys=4, asked=4),
}
DRAW: dict[str, Callable[[Random], str]] = {
    "words": pair,
    "numbers": lambda random: str(random.randint(10**6, 10**7 - 1)),
    "uuids": lambda random: str(UUID(int=random.getrandbits(128), version=4)),
}


def draft(kind: Kind, essay: Sequence[str], random: Random, tokens: int) -> Draft:
    """A sample of this kind, its units the words of `essay` or lines of the haystack."""
    lines = tokens // SHORTEST_LINE
    hidden = kind.keys * kind.each
    others = lines if kind.haystack == "needle" else 0
    keys = _distinct(random, kind.key, kind.keys + others)
    values = _distinct(random, kind.value, hidden + others)
    owners = [key for key in keys[: kind.keys] for _ in range(kind.each)] + keys[kind.keys :]
    facts = [needle(kind, *fact) for fact in zip(owners, values, strict=True)]
    needles, distractors = random.sample(facts[:hidden], hidden), facts[hidden:]
    asked = random.sample(range(kind.keys), kind.asked)
    answers = tuple(values[i * kind.each + j] for i in asked for j in range(kind.each))
    depths, places = _ruler_essay.depths(random, hidden), random.random()

    def make(n: int) -> Sample:
        if kind.haystack == "essay":
            haystack = _ruler_essay.hide(essay, n, needles, depths)
        else:
            haystack = _lines(distractors[:n] or [NOISE] * n, needles, Random(places))
        meta: dict[str, Any] = {}
        if len(answers) == 1:
            only = next(text for text in needles if answers[0] in text)
            meta["depth"] = haystack.index(only) / max(1, len(haystack) - len(only))
        texts = prompt(kind, haystack, [keys[i] for i in asked])
        return Sample(*texts, answers, "string_match_all", MAX_NEW_TOKENS, meta)

    if kind.haystack == "essay":
        return Draft("words of the book", 1, tokens, make)
    return Draft("lines", hidden, lines, make)


def needle(kind: Kind, key: str, value: str) -> str:
    """The sentence that hides one value of a key."""
    return f"One of the special magic {kind.value} for {key} is: {value}."


def prompt(kind: Kind, haystack: str, asked: Sequence[str]) -> tuple[str, str, str]:
    """(context, question, answer prefix), worded for one answer or for several."""
    one = kind.asked * kind.each == 1
    what = kind.value[:-1] if one else kind.value
    some, are, are_all = ("A", "is", "is") if one else ("Some", "are", "are all")
    keys = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    return (
        f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n{haystack}\n",
        f"What {are_all} the special magic {what} for {keys} mentioned in the provided text?",
        f" The special magic {what} for {keys} mentioned in the provided text {are}",
    )


def _lines(lines: Sequence[str], needles: Sequence[str], random: Random) -> str:
    """The needles before lines drawn at random, each before another one."""
    lines = list(lines)
    for at, text in zip(sorted(random.sample(range(len(lines)), len(needles)), reverse=True), needles, strict=True):
        lines.insert(at, text)
    return "\n".join(lines)


def _distinct(random: Random, what: str, n: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found[DRAW[what](random)] = None
    return list(found)
