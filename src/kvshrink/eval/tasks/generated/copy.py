"""Copy: a text of words in random order, and the words that follow three of them are asked for.

Source: the induction test (arXiv 2209.11895) in the wording that the bundled reference model was trained on. The words
come from the bundled held-out book; they are all different while the book has different ones.
Scored by the share of the next four words before the first wrong one.
"""

import re
from random import Random

from kvshrink.eval.tasks import Count, Sample, _book
from kvshrink.eval.tasks._common import check_count, depth, fill, rng

LEAD, ANSWER = 3, 4  # words
INTRO = "Text: "
QUESTION = "Repeat the text."
LETTERS = re.compile("[a-z]{3,8}")


def samples(n: int, seed: int, *, tokens: int = 4000, count: Count) -> list[Sample]:
    """n texts that fill `tokens` tokens with bos and answer; the asked stretch is at evenly spread depths."""
    check_count("copy", n)
    words = sorted({word for word in _book.words(None) if LETTERS.fullmatch(word)})
    return [_sample(seed, i, words, tokens, count) for i in range(n)]


def _sample(seed: int, index: int, words: list[str], tokens: int, count: Count) -> Sample:
    order = _words_in_order(rng("copy", seed, index), words, tokens)

    def make(size: int) -> list[Sample]:
        start = round(depth(index) * (size - LEAD - ANSWER))
        lead, answer = order[start : start + LEAD], order[start + LEAD : start + LEAD + ANSWER]
        question = f"{QUESTION} {' '.join(lead)}"
        meta = {"index": index, "depth": depth(index), "words": size}
        context = f"{INTRO}{' '.join(order[:size])}\n"
        return [Sample(context, question, "", (" ".join(answer),), "leading_words", 9 * ANSWER, meta)]

    return fill("copy", make, 2 * (LEAD + ANSWER), tokens, "words", tokens, count)[0]


def _words_in_order(random: Random, words: list[str], n: int) -> list[str]:
    """n words: all of them in a random order, then all of them in another, and so on."""
    order: list[str] = []
    while len(order) < n:
        order += random.sample(words, len(words))
    return order[:n]
