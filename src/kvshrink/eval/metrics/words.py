"""Are the words right? Of a text that goes on, of an answer in the model's own words, and of a copy."""

import re
from typing import Any

from kvshrink.eval.metrics import _text

END_OF_QUOTE = re.compile('["\n]')
SAME_TOPIC = 0.5  # token F1


def quoted(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the output up to its first quotation mark or line end is an answer: the prompt has opened the quote."""
    return float(END_OF_QUOTE.split(text)[0] in answers)


def leading_words(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The share of the answer's words that the output gives before its first wrong one."""
    wanted, given = answers[0].split(), text.split()
    wrong = (i for i, word in enumerate(wanted) if i >= len(given) or given[i] != word)
    return next(wrong, len(wanted)) / len(wanted)


def word_recall(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The share of the answer's different words that are anywhere in the output, in lower case, without punctuation.

    Source: KVCache-Factory@c97f9d70, |words(output) & words(answer)| / |words(answer)|, for the needle in a haystack.
    """
    wanted = set(_plain(answers[0]))
    return len(wanted & set(_plain(text))) / len(wanted)


def topic(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the output holds the topic or is nearest to it: an offline variant of LongEval's topic score.

    LongChat@4b5faa52 asks gpt-3.5-turbo whether the topics are the same. Here both lose case, punctuation and articles;
    then the topic's words stand in the output in a row, or the F1 of the words is at least 0.5 and higher than with
    any of meta["others"]: many of LongEval's topics begin alike, "The future of renewable energy technology" and
    "... storage". An output that lists every topic is right here, and may be wrong there.
    """
    given, wanted = _text.words(text), _text.words(answers[0])
    if f" {' '.join(wanted)} " in f" {' '.join(given)} ":
        return 1.0
    nearest_other = max((_text.f1(given, _text.words(other)) for other in meta["others"]), default=0.0)
    near = _text.f1(given, wanted)
    return float(near >= SAME_TOPIC and near > nearest_other)


def _plain(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
