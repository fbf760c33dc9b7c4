"""RULER's string matches (github.com/NVIDIA/RULER@c3f5e3b4, scripts/eval), here from 0 to 1 instead of to 100.

Upper and lower case are the same. Each control character of the output counts as a line break, as upstream has it.
lm-evaluation-harness's `string_match_part` gives the share of the references found: less than RULER's wherever a
question has several. Here, as in RULER, one of them is enough.
"""

import re
from typing import Any


def string_match_all(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The share of the answers that stand in the text: RULER's score of all its synthetic tasks."""
    return sum(_found(text, answers)) / len(answers)


def string_match_part(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if any of the answers stands in the text: RULER's score of its two question answering tasks."""
    return float(any(_found(text, answers)))


def _found(text: str, answers: tuple[str, ...]) -> list[bool]:
    text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]
