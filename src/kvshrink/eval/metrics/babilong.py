"""BABILong's rule where an answer is several labels (qa8); the others use `one_label`.

Source: github.com/booydar/babilong (metrics.py), arXiv 2406.10149.
"""

from typing import Any


def exact_labels(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the first sentence names all labels of the answer ("apple,milk") and no other of meta["labels"]."""
    text = text.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {label for label in meta["labels"] if label.lower() in text}
    return float(named == set(answers[0].split(",")))
