"""Needle: one "special magic number" of seven digits hidden in book text.

Source: RULER niah_single_2 (arXiv 2404.06654), in the wording that the bundled reference model was trained on.
Differs from RULER: the haystack is a held-out book instead of essays, and the fixed phrases are shorter.
Right means that the output, from its first character up to the first one that is no digit, is the number.
"""

from pathlib import Path
from random import Random

from kvshrink.eval.tasks import Sample, _book, _words
from kvshrink.eval.tasks._common import leading_digits

INTRO = "Some special magic numbers are hidden within the following text."


def samples(
    n: int,
    seed: int,
    *,
    tokens: int = 4000,
    chars_per_token: float = _book.CHARS_PER_TOKEN,
    path: str | Path | None = None,
) -> list[Sample]:
    """n samples at evenly spread depths, each below `tokens` tokens with bos and answer.

    chars_per_token: characters a token of the model's tokenizer in book text, at least.
    path:            a text file to use instead of the bundled held-out book.
    """
    return _book.samples("needle", _needle, n, seed, tokens, chars_per_token, path)


def score(sample: Sample, text: str) -> float:
    return float(leading_digits(text) in sample.answers)


def _needle(random: Random) -> _book.Needle:
    key, number = _words.keys(random, 1)[0], _book.digits(random, 7)
    return _book.Needle(
        intro=INTRO,
        sentence=f"One of the special magic numbers for {key} is: {number}.",
        question=f"What is the special magic number for {key} mentioned in the provided text?",
        answer_prefix=f" The special magic number for {key} mentioned in the provided text is: ",
        answer=number,
        meta={"key": key},
    )
