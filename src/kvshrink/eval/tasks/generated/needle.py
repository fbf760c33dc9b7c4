"""Needle: one sentence hidden in book text.

Two wordings, and each is scored its own way:
  reference  RULER niah_single_2 (arXiv 2404.06654) as the bundled reference model was trained on it: a "special magic
             number" of seven digits; the output must begin with it. Shorter fixed phrases than RULER's.
  official   LLMTest_NeedleInAHaystack@7b90d285: the sandwich in Dolores Park, after the last full stop before the
             depth. Scored by the share of the answer's words in the output, as KVCache-Factory@c97f9d70 does, not by
             GPT-3.5; the expected words are what the needle says is best, not the words that the question has too.
Differs from both: the haystack is a held-out book instead of essays.

For a grid of depths and lengths, call it with depth= and tokens= of each cell; meta has `depth` and `length`.
"""

from pathlib import Path
from random import Random

from kvshrink.eval.tasks import Count, Sample, _book, _words
from kvshrink.eval.tasks._common import WORDINGS, check_known

INTRO = "Some special magic numbers are hidden within the following text. "
SENTENCE = "One of the special magic numbers for {key} is: {number}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
PREFIX = " The special magic number for {key} mentioned in the provided text is: "
OFFICIAL_INTRO = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n"
OFFICIAL_ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"


def samples(
    n: int,
    seed: int,
    *,
    tokens: int = 4000,
    count: Count,
    path: str | Path | None = None,
    depth: float | None = None,
    wording: str = "reference",
) -> list[Sample]:
    """n samples, each filling `tokens` tokens with bos and answer.

    path:  a text file to use instead of the bundled held-out book.
    depth: where the needle stands, from 0 (start) to 1 (end); None spreads the samples evenly.
    """
    check_known("needle", "wording", wording, WORDINGS)
    word = _official if wording == "official" else _reference
    text = _book.words(path)
    return _book.samples("needle", word, n, seed, text, tokens, count, depth, at_stop=wording == "official")


def _reference(random: Random, depth: float) -> _book.Hidden:
    key, number = _words.keys(random, 1)[0], _book.digits(random, 7)
    return _book.Hidden(
        intro=INTRO,
        sentences=((depth, SENTENCE.format(key=key, number=number)),),
        question=QUESTION.format(key=key),
        answer_prefix=PREFIX.format(key=key),
        answer=number,
        metric="leading_digits",
        max_new_tokens=10,
        meta={"key": key},
    )


def _official(random: Random, depth: float) -> _book.Hidden:
    return _book.Hidden(
        intro=OFFICIAL_INTRO,
        sentences=((depth, f"\nThe best thing to do in San Francisco is {OFFICIAL_ANSWER}.\n"),),
        question="\nWhat is the best thing to do in San Francisco? "
        "Don't give information outside the document or repeat your findings",
        answer_prefix="",
        answer=OFFICIAL_ANSWER,
        metric="word_recall",
        max_new_tokens=60,
        meta={},
    )
