"""Is the set right? Of a list in the output, without regard to order."""

import re
from typing import Any

LIST = re.compile(r"\[([^\]]*)\]")


def set_f1(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """F1 of the set of answers and the set that the output's last bracketed list holds, 1.0 if both are empty.

    Source: GraphWalks (openai/graphwalks) scores a last line "Final Answer: [a, b]" by set F1. Departure: the list
    counts without these words and with text behind it. Without any list the score is 0.
    """
    lists = LIST.findall(text)
    if not lists:
        return 0.0
    given, wanted = {item.strip(" \t\r\n'\"`") for item in lists[-1].split(",")} - {""}, set(answers)
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given or wanted else 1.0
