"""Which rows of a batch an operation asks for, checked before any layer has changed."""

from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import CacheError
from kvshrink.shapes import Int

KINDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def row_indices(given: Any, rows: int, what: str) -> Int[Tensor, " n"]:
    """Rows as indices from 0 on. Raises CacheError unless they are one or more whole numbers of rows that are there."""
    try:
        index = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"{what} takes a 1-D tensor of row numbers, not a {type(given).__name__}.") from error
    if index.dtype == torch.bool and index.shape == (rows,):  # rows to keep
        index = index.nonzero()[:, 0]
    if index.dim() != 1 or index.dtype not in KINDS:
        raise CacheError(
            f"{what} takes a 1-D tensor of row numbers, not one of {index.dtype} with shape {tuple(index.shape)}."
        )
    if not len(index):
        raise CacheError(f"{what} would leave none of {rows} rows. Name one or more, or call reset().")
    least, most = (int(x) for x in index.aminmax())
    if least < -rows or most >= rows:
        raise CacheError(f"{what} names rows {least} to {most}, but the cache holds {rows}: 0 to {rows - 1}.")
    return torch.where(index < 0, index.long() + rows, index.long())


def repeats_of(given: Any) -> int:
    """How often each row shall be there. Raises CacheError unless it is a whole number from 1 on."""
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise CacheError(f"batch_repeat_interleave takes a whole number from 1 on, not {given!r}.")
    return given


def crop_count(given: Any, seen: int) -> int:
    """How many tokens go: a count at or below 0, negated, or, from older transformers, a length above 0 to keep."""
    if isinstance(given, Tensor) and given.numel() == 1:
        given = given.item()
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int):
        raise CacheError(f"crop takes a whole number of tokens, such as -3 to take back three, not {given!r}.")
    return -given if given <= 0 else max(0, seen - given)
