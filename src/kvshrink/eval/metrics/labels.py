"""Is it the right one of a few labels?"""

from typing import Any


def one_label(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the first sentence of the output names exactly one of meta["labels"], and that one is the answer.

    Source: RMT-team/babilong@7a6efee2, metrics.py. Upper and lower case are the same, and a label is named where its
    letters stand, inside a word too. Labels that the question names are left out of meta["labels"].
    """
    sentence = text.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {label.lower() for label in meta["labels"] if label.lower() in sentence}
    return float(named == {answers[0].lower()})
