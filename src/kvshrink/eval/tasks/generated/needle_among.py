"""Needle among four: four "special magic numbers" of different keys in book text, and one of them is asked for.

Source: RULER niah_multikey_1 (arXiv 2404.06654), in the wording that the bundled reference model was trained on; the
official wording is a variant of the task `ruler`. The asked needle is at the sample's depth, the other three anywhere.
Differs from RULER: the haystack is a held-out book instead of essays, and the fixed phrases are shorter.
Right means that the output begins with the number.
"""

from pathlib import Path
from random import Random

from kvshrink.eval.tasks import Count, Sample, _book, _words
from kvshrink.eval.tasks.generated.needle import INTRO, PREFIX, QUESTION, SENTENCE

NEEDLES = 4


def samples(
    n: int,
    seed: int,
    *,
    tokens: int = 4000,
    count: Count,
    path: str | Path | None = None,
    depth: float | None = None,
) -> list[Sample]:
    """n samples, each filling `tokens` tokens with bos and answer.

    path:  a text file to use instead of the bundled held-out book.
    depth: where the asked needle stands, from 0 (start) to 1 (end); None spreads the samples evenly.
    """
    return _book.samples("needle_among", _needles, n, seed, _book.words(path), tokens, count, depth)


def _needles(random: Random, depth: float) -> _book.Hidden:
    keys = _words.keys(random, NEEDLES)
    numbers = [_book.digits(random, 7) for _ in keys]
    depths = [depth, *(random.random() for _ in keys[1:])]
    sentences = [SENTENCE.format(key=key, number=number) for key, number in zip(keys, numbers, strict=True)]
    return _book.Hidden(
        intro=INTRO,
        sentences=tuple(sorted(zip(depths, sentences, strict=True))),
        question=QUESTION.format(key=keys[0]),
        answer_prefix=PREFIX.format(key=keys[0]),
        answer=numbers[0],
        metric="leading_digits",
        max_new_tokens=10,
        meta={"key": keys[0], "others": numbers[1:]},
    )
