"""Rows of calibration text with a passage of them repeated at the end."""

import random
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.families import text_config
from kvshrink.errors import DataError
from kvshrink.methods._roles import Method
from kvshrink.shapes import Int

ROWS, LENGTH = 4, 2048  # tokens of a row, or what the model and the text allow
REPEATED = 4  # a quarter of a row is the repetition
SEED = 0


def row_length(model: Any, rows: Int[Tensor, "rows length"]) -> int:
    """Tokens of a row: LENGTH, or what the model and the text allow."""
    context = getattr(text_config(model), "max_position_embeddings", None) or LENGTH
    return min(LENGTH, context, rows.numel())


def recall_rows(
    rows: Int[Tensor, "rows length"],
    length: int,
    method: Method,
    count: int | None = None,
    plain: bool = False,
    repeated: int = REPEATED,
) -> Int[Tensor, "made tokens"]:
    """`count` rows (None: ROWS) of `length` tokens: text, then a passage of it again; with `plain` every other row just
    goes on.

    repeated: the passage is one part of so many of a row.

    Raises DataError if the text is too short for a page to leave the window before the repetition.
    """
    first, stream = rows[:, :1].flatten()[:1], rows.flatten()
    length = min(length, len(stream))
    tail = length // repeated
    context = length - tail - 1
    room = context - tail - method.window - method.page
    if room <= method.sinks:
        least = 2 * (method.window + method.page + method.sinks + 2)
        raise DataError(f"{len(stream)} calibration tokens are too few to probe the model. Give {least} or more.")
    draw, made, count = random.Random(SEED), [], ROWS if count is None else count
    for i in range(count):
        # evenly over the text, so that a mixed text is probed in all its parts
        at = round(i * (len(stream) - context) / max(1, count - 1))
        passage = at + draw.randrange(method.sinks, room + 1)
        if plain and i % 2:
            at = min(at, len(stream) - context - tail)
            passage = at + context
        made.append(torch.cat([first, stream[at : at + context], stream[passage : passage + tail]]))
    return torch.stack(made)
