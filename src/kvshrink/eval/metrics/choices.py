"""Which of A, B, C, D did the output choose?

Sources: LongBench v2 (github.com/THUDM/LongBench@2e00731f, pred.py) and InfiniteBench@88b3daa6 (compute_scores.py).
"""

import re
from typing import Any

PREFIXES = ("answer is:", "answer:", "answer is", "option is")
MARKS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))


def choice_letter(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """LongBench v2: the letter after "The correct answer is", first in parentheses, else without; asterisks dropped."""
    text = text.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search("The correct answer is ([A-D])", text)
    return float(found is not None and found[1] == answers[0])


def choice_or_text(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """InfiniteBench: answers are the option's text and its letter; either counts, by the first rule that applies.

    The output starts with a letter; it is an answer; what follows "answer is" and the like starts with an answer; the
    first word that is a letter. As upstream, a run such as "AB" in a word position is taken for a letter, and wrong.
    """
    text = text.strip()
    if text[:1] in tuple("ABCD"):
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = re.sub(" +", " ", text.translate(MARKS))
    for prefix in PREFIXES:
        if prefix in text:
            after = text[text.find(prefix) + len(prefix) + 1 :]
            return float(bool(after) and after.startswith(answers))
    letter = next((word for word in text.split() if word in "ABCD"), "")
    return float(letter in answers)
