# ruff: noqa: RUF001
"""What the text metrics share: the usual normalisation, token F1, Chinese words, and the longest common subsequence."""

import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from kvshrink.errors import EvalError

# the Chinese marks that LongBench, LV-Eval and InfiniteBench remove beside the ASCII ones
MARKS_ZH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》"
    "「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
MARKS = str.maketrans("", "", string.punctuation)
ALL_MARKS = str.maketrans("", "", string.punctuation + MARKS_ZH)


def answered(text: str, meta: dict[str, Any]) -> str:
    """The part of an output that is scored: with meta["first_line"], its first line that is not empty."""
    return text.lstrip("\n").split("\n")[0] if meta.get("first_line") else text


def words(text: str) -> list[str]:
    """Lower case, no ASCII punctuation, no articles: the words of SQuAD's normalisation."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(MARKS)).split()


def bare_zh(text: str) -> str:
    """Lower case, no punctuation, no white space."""
    return "".join(text.lower().translate(ALL_MARKS).split())


def cut_zh(text: str) -> list[str]:
    """The words of a Chinese text, by jieba. Raises EvalError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba 0.42 warns of its own source while it is imported
            jieba = importlib.import_module("jieba")
    except ImportError as error:
        raise EvalError(f"Chinese scores need jieba ({error}). Install it: pip install 'kvshrink[zh]'.") from error
    return list(jieba.cut(text, cut_all=False))


def words_zh(text: str) -> list[str]:
    """The words of a Chinese text without punctuation."""
    return [word for token in cut_zh(text) if (word := bare_zh(token))]


def f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, each counted as often as both sides have it."""
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """A longest common subsequence of a and b, as the positions in both.

    Of several, the one that is found from the ends backwards by leaving out b's last item wherever leaving out a's
    does not keep more: the two ROUGE packages that benchmarks use differ in this choice, and take it or its mirror.
    """
    lengths = [[0] * (len(b) + 1)]
    for x in a:
        above, row = lengths[-1], [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, pairs = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def sentences(text: str) -> list[list[str]]:
    """The words between full stops, by the rules of PyPI rouge: a sentence of white space is one empty word."""
    return [part.split() or [""] for part in text.split(".") if part]


def rouge_shares(text: str, answer: str) -> tuple[float, float]:
    """(precision, recall) of PyPI rouge's ROUGE-L; 0 where the package refuses an empty text."""
    found, wanted = sentences(text), sentences(answer)
    both = {r[i] for r in wanted for h in found for i, _ in common(r, h)}
    if not both:
        return 0.0, 0.0
    return len(both) / len(set(chain(*found))), len(both) / len(set(chain(*wanted)))
