"""LooGLE's scores that need no model: BLEU, recall of ROUGE, and matches of a cloze.

Source: github.com/bigai-nlco/LooGLE@67343822 (Evaluation/automatic_metrics.py), arXiv 2311.04939.
"""

import json
import math
from collections import Counter
from itertools import chain
from typing import Any

from kvshrink.data import text as texts
from kvshrink.eval.metrics import _text


def bleu_1(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the output's words that are in the answer, times the brevity penalty."""
    return _bleu(text, answers[0], 1)


def bleu_4(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The same with runs of four words only, as upstream (not the usual mean over 1 to 4). 0 if there is none."""
    return _bleu(text, answers[0], 4)


def rouge_1_recall(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the answer's different words that the output has, by the rules of PyPI rouge."""
    return _recall(text, answers[0], 1)


def rouge_2_recall(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The same with pairs of words."""
    return _recall(text, answers[0], 2)


def rouge_l_recall(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the answer's different words in common subsequences, by the rules of PyPI rouge."""
    return _text.rouge_shares(text, answers[0])[1]


def cloze_exact(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the masks (answers[0] is a JSON object) for which the output, a Python dictionary, has the answer.

    Differs from upstream: the mean over questions, not over masks, and the output is read as a literal, not evaluated.
    """
    return _cloze(text, answers[0], lambda found, wanted: found == wanted)


def cloze_partial(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The same, but one word in common is enough. A value that is no text spoils the whole output, as upstream."""
    return _cloze(text, answers[0], lambda found, wanted: bool(set(found.split()) & set(wanted.split())))


def _bleu(text: str, answer: str, n: int) -> float:
    found, wanted = text.split(), answer.split()
    runs, right = _runs(found, n), _runs(wanted, n)
    if not runs:
        return 0.0
    short = math.exp(1 - len(wanted) / len(found)) if len(found) < len(wanted) else 1.0
    return short * (runs & right).total() / runs.total()


def _recall(text: str, answer: str, n: int) -> float:
    found, wanted = (_runs([*chain(*_text.sentences(t))], n) for t in (text, answer))
    return len(found & wanted) / len(wanted) if wanted else 0.0


def _runs(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _cloze(text: str, answer: str, same: Any) -> float:
    wanted = json.loads(answer)
    try:
        found: Any = texts.literal(text.strip())
        right = sum(same(found[mask], entity) for mask, entity in wanted.items() if mask in found)
    except (ValueError, TypeError, AttributeError):
        return 0.0
    return right / len(wanted)
