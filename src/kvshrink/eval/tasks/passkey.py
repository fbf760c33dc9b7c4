"""Passkey: a five-digit number hidden once in book text.

Source: Landmark Attention (arXiv 2305.16300), in the wording that the bundled reference model was trained on.
Differs from the paper: the filler is a book held out of the model's training instead of repeated sentences, and the
key stands once in the needle instead of twice.
Right means that the output, from its first character up to the first one that is no digit, is the key.
"""

from pathlib import Path
from random import Random

from kvshrink.eval.tasks import Sample, _book
from kvshrink.eval.tasks._common import leading_digits

INTRO = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."


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
    return _book.samples("passkey", _needle, n, seed, tokens, chars_per_token, path)


def score(sample: Sample, text: str) -> float:
    return float(leading_digits(text) in sample.answers)


def _needle(random: Random) -> _book.Needle:
    key = _book.digits(random, 5)
    return _book.Needle(
        intro=INTRO,
        sentence=f"The pass key is {key}. Remember it.",
        question="What is the pass key?",
        answer_prefix=" The pass key is ",
        answer=key,
        meta={},
    )
