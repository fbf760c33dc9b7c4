"""How much of a summary is in the reference's order: ROUGE-L as the benchmarks compute it, which is not one way.

Sources: PyPI rouge 1.0.1 (LongBench, LV-Eval, LooGLE) and PyPI rouge-score 0.1.2 (InfiniteBench, SCBench).
Differs from LongBench: its package fails on sentences of about 1000 words, and the score is 0 then; not here.
"""

import re
from collections import Counter
from itertools import chain
from typing import Any

from kvshrink.eval.metrics import _text


def rouge_l(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """F of the words in common subsequences, the best of several references, by the rules of PyPI rouge.

    Sentences end at full stops. The union of the words common to any two sentences is set against the number of
    different words of each side: a word counts once, however often it stands there.
    """
    text = _text.answered(text, meta)
    return max(_rouge_f(text, answer) for answer in answers)


def rouge_l_zh(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The same over Chinese words. Needs jieba."""
    text = " ".join(_text.cut_zh(text))
    return max(_rouge_f(text, " ".join(_text.cut_zh(answer))) for answer in answers)


def rouge_lsum(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """F of rougeLsum, the best of several references, by the rules of PyPI rouge-score without stemming.

    Sentences end at line ends, words are runs of a-z and 0-9, and a word counts at most as often as either side has it.
    """
    return max(_lsum(text, answer) for answer in answers)


def _rouge_f(text: str, answer: str) -> float:
    precision, recall = _text.rouge_shares(text, answer)
    return 2 * precision * recall / (precision + recall + 1e-8)


def _lsum(text: str, answer: str) -> float:
    found, wanted = _lines(text), _lines(answer)
    left = Counter(chain(*found)) & Counter(chain(*wanted))
    hits = 0
    for line in wanted:
        for i in sorted({i for other in found for _, i in _text.common(other, line)}):
            hits += left[line[i]] > 0
            left[line[i]] -= 1
    return 2 * hits / (sum(map(len, found)) + sum(map(len, wanted))) if hits else 0.0


def _lines(text: str) -> list[list[str]]:
    return [re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n")]
