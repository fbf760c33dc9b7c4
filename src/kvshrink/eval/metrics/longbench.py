"""LongBench's own rules: classes, numbers of paragraphs and lines of code. Its F1 and ROUGE are in qa.py and rouge.py.

Source: github.com/THUDM/LongBench@2e00731f (metrics.py).
"""

import importlib
import re
from typing import Any

from kvshrink.errors import EvalError
from kvshrink.eval.metrics import _text

COMMENTS = ("`", "#", "//")


def classification(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1 / number of classes (meta["classes"]) that the output names, if the answer is one of them.

    Names that are part of the answer's name do not count. As upstream, they are removed from the list while it is
    gone through, so the name after a removed one is skipped, and counts.
    """
    text = _text.answered(text, meta)
    return max(_share(text, answer, meta["classes"]) for answer in answers)


def retrieval(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the output's integers that are the paragraph's: the answer is "Paragraph 7" or the same in Chinese."""
    return max(_right(text, re.search("(?:Paragraph |段落)([0-9]+)", answer)) for answer in answers)


def count_share(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the output's integers that are the answer."""
    return max(_right(text, re.match("(.*)", answer)) for answer in answers)


def code_similarity(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Likeness of the first line that is no comment to the answer, in whole percent. Needs rapidfuzz.

    Differs from upstream: fuzzywuzzy takes difflib's ratio where python-Levenshtein is not installed; this is the
    one with it, 2 * common subsequence / both lengths.
    """
    try:
        fuzz = importlib.import_module("rapidfuzz.fuzz")
    except ImportError as error:
        raise EvalError(f"code_similarity needs rapidfuzz ({error}): pip install 'kvshrink[eval]'.") from error
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in COMMENTS)), "")
    return max(round(fuzz.ratio(line, answer)) / 100 if line and answer else 0.0 for answer in answers)


def _share(text: str, answer: str, classes: list[str]) -> float:
    named = [name for name in classes if name in text]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def _right(text: str, answer: re.Match[str] | None) -> float:
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer[1]) / len(numbers) if numbers and answer else 0.0
