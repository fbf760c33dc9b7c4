"""Passkey: a five-digit number hidden once in filler text.

Source: Landmark Attention (arXiv 2305.16300); official wording and noise: InfiniteBench@88b3daa6.
Two wordings, and each is scored its own way:
  reference  what the bundled reference model was trained on; the output must begin with the key
  official   InfiniteBench's prompt; the first number of the output must be the key
Two fillers: a book held out of the reference model's training (in neither source), or the repeated noise sentences.
Differs from InfiniteBench: the first digit is not 0, and noise is cut at a word, not at a line.
"""

from pathlib import Path
from random import Random

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _book
from kvshrink.eval.tasks._common import WORDINGS, check_known

VARIANTS: dict[str, dict] = {"book": {}, "noise": {"filler": "noise"}}
FILLERS = ("book", "noise")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRO = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
OFFICIAL_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n\n"
)


def samples(
    n: int,
    seed: int,
    *,
    tokens: int = 4000,
    count: Count,
    path: str | Path | None = None,
    filler: str = "book",
    wording: str = "reference",
) -> list[Sample]:
    """n samples at evenly spread depths, each filling `tokens` tokens with bos and answer.

    path: a text file to use instead of the bundled held-out book.
    """
    check_known("passkey", "filler", filler, FILLERS)
    check_known("passkey", "wording", wording, WORDINGS)
    if filler == "noise" and path is not None:
        raise EvalError(f"passkey: noise reads no file, got path={path}. Drop path= or use filler='book'.")
    text = _book.words(path) if filler == "book" else NOISE.split() * (tokens // 10)
    word = _official if wording == "official" else _reference
    return _book.samples("passkey", word, n, seed, text, tokens, count, at_stop=filler == "noise")


def _reference(random: Random, depth: float) -> _book.Hidden:
    key = _book.digits(random, 5)
    return _book.Hidden(
        intro=INTRO,
        sentences=((depth, f"The pass key is {key}. Remember it."),),
        question="What is the pass key?",
        answer_prefix=" The pass key is ",
        answer=key,
        metric="leading_digits",
        max_new_tokens=8,
        meta={},
    )


def _official(random: Random, depth: float) -> _book.Hidden:
    key = _book.digits(random, 5)
    return _book.Hidden(
        intro=OFFICIAL_INTRO,
        sentences=((depth, f"The pass key is {key}. Remember it. {key} is the pass key."),),
        question="\nWhat is the pass key?",
        answer_prefix="\n\nThe pass key is",
        answer=key,
        metric="first_integer",
        max_new_tokens=8,
        meta={},
    )
