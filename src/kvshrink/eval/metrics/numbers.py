"""Is the number right? Near misses are wrong: 4244 is not 42440."""

import re
from typing import Any


def leading_digits(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the output, from its first character up to the first one that is no digit, is an answer."""
    found = re.match("[0-9]+", text)
    return float(found is not None and found[0] in answers)


def last_integer(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the last run of digits anywhere in the text is the answer: LongEval's official rule."""
    found = re.findall("[0-9]+", text)
    return float(bool(found) and int(found[-1]) == int(answers[0]))


def first_integer(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the first run of digits anywhere in the text is the answer; kinder to a model that talks on."""
    found = re.search("[0-9]+", text)
    return float(found is not None and int(found[0]) == int(answers[0]))
