"""Does the answer have the reference's words? Token F1, the best of several references.

Source: github.com/THUDM/LongBench@2e00731f (metrics.py), after SQuAD; InfiniteBench@88b3daa6 for qa_f1_chars.
"""

from typing import Any

from kvshrink.eval.metrics import _text


def qa_f1(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """F1 over lower-case words without punctuation and articles."""
    found = _text.words(_text.answered(text, meta))
    return max(_text.f1(found, _text.words(answer)) for answer in answers)


def qa_f1_zh(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """F1 over Chinese words without punctuation. Needs jieba."""
    found = _text.words_zh(text)
    return max(_text.f1(found, _text.words_zh(answer)) for answer in answers)


def qa_f1_chars(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """F1 over characters without punctuation: InfiniteBench's rule for Chinese."""
    found = _text.bare_zh(text)
    return max(_text.f1(found, _text.bare_zh(answer)) for answer in answers)
