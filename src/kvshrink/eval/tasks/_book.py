"""Sentences hidden in book text: the loop of passkey, needle and the like. Each of them only words its sentences."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, final

from kvshrink import data
from kvshrink.data.text import read_text
from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample
from kvshrink.eval.tasks._common import check_count, depth, fill, rng

SHORTEST = 20  # words of text


@final
@dataclass(frozen=True)
class Hidden:
    """The texts of one sample.

    intro:     opens the context.
    sentences: (depth, sentence) pairs in the order of the text; the depths do not fall.
    """

    intro: str
    sentences: tuple[tuple[float, str], ...]
    question: str
    answer_prefix: str
    answer: str
    metric: str
    max_new_tokens: int
    meta: dict[str, Any]


def samples(
    task: str,
    word: Callable[[Random, float], Hidden],
    n: int,
    seed: int,
    text: list[str],
    tokens: int,
    count: Count,
    at: float | None = None,
    at_stop: bool = False,
) -> list[Sample]:
    """n samples whose prompt, bos and generated answer fill `tokens`. word(random, depth) gives the texts of one.

    text:    the words to hide in.
    at:      one depth for all, from 0 to 1; None spreads them evenly.
    at_stop: a sentence is moved back to the last full stop; if not, it may stand inside one of the text.

    Raises EvalError if `tokens` leaves no room for the text, or needs more of it than there is.
    """
    check_count(task, n)
    if at is not None and not 0 <= at <= 1:
        raise EvalError(f"{task}: depth={at}. Use 0 (start) to 1 (end), or None to spread the samples.")
    if len(text) <= SHORTEST:
        raise EvalError(f"{task}: the text to hide in has {len(text)} words. Give a longer text as path=.")
    return [_hide(task, word, seed, i, text, tokens, count, at, at_stop) for i in range(n)]


def words(path: str | Path | None) -> list[str]:
    """The words of `path` (the bundled heldout.txt if None). Raises EvalError if it cannot be read."""
    source = data.path("heldout.txt") if path is None else path
    return read_text(source, "Cannot read the book text", EvalError).split()


def digits(random: Random, n: int) -> str:
    """A number of n digits, the first not 0."""
    return str(random.randrange(10 ** (n - 1), 10**n))


def insert(text: list[str], sentences: tuple[tuple[float, str], ...], at_stop: bool) -> str:
    """The words with each sentence at its depth, joined by spaces."""
    parts: list[str] = []
    done = 0
    for share, sentence in sentences:
        at = round(share * len(text))
        while at_stop and at > done and not text[at - 1].endswith("."):
            at -= 1
        parts += [*text[done:at], sentence]
        done = at
    return " ".join(parts + text[done:])


def _hide(
    task: str,
    word: Callable[[Random, float], Hidden],
    seed: int,
    index: int,
    text: list[str],
    tokens: int,
    count: Count,
    at: float | None,
    at_stop: bool,
) -> Sample:
    random = rng(task, seed, index)
    share = depth(index) if at is None else at
    hidden = word(random, share)
    start = random.random()

    def make(size: int) -> list[Sample]:
        first = round(start * (len(text) - size))
        context = hidden.intro + insert(text[first : first + size], hidden.sentences, at_stop) + "\n"
        meta = {"index": index, "depth": share, **hidden.meta}
        answers, limit = (hidden.answer,), hidden.max_new_tokens
        return [Sample(context, hidden.question, hidden.answer_prefix, answers, hidden.metric, limit, meta)]

    # a word is at least a token, so `tokens` words are too many
    most = min(len(text), tokens)
    return fill(task, make, SHORTEST, most, "words of text", tokens, count, " or give a longer text as path=")[0]
