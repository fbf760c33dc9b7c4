"""Calibration text to token rows of equal length."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.shapes import Int


def rows_of(data: Any, tokenizer: Callable[[], Any], length: int, page: int) -> Int[Tensor, "rows length"]:
    """Token rows from text(s) or token rows, also from an iterator of these. tokenizer: gives one, where text needs it.

    Raises DataError on anything else.
    """
    found: list[Any]
    if isinstance(data, str | Tensor):
        found = [data]
    else:
        if not isinstance(data, Iterable) or isinstance(data, bytes | Mapping | PurePath):
            hint = " Pass what is in it: Path(...).read_text()." if isinstance(data, PurePath) else ""
            raise DataError(f"data of type {type(data).__name__} is no text. Give text(s), or token rows.{hint}")
        found = list(data)
    kinds = {str if isinstance(x, str) else Tensor if isinstance(x, Tensor) else type(x) for x in found}
    if kinds == {str}:
        return token_rows(found, tokenizer(), length, page)
    if kinds != {Tensor}:
        names = ", ".join(sorted(k.__name__ for k in kinds)) or "nothing"
        raise DataError(f"the calibration data holds {names}. Give text(s), or token rows as tensors.")
    return checked_rows(data if isinstance(data, Tensor) else found, page)


def token_rows(texts: str | Sequence[str], tokenizer, length: int, page: int) -> Int[Tensor, "rows length"]:
    """Rows of `length` tokens from all texts joined, each behind a bos if the tokenizer has one; the tail is dropped.

    A text shorter than one row makes one shorter row. Raises DataError if there is less than a page of it.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not any(t.strip() for t in texts):
        raise DataError("the calibration text is empty. Give a text file of some 100 kB.")
    ids = [i for t in texts for i in tokenizer(t, add_special_tokens=False)["input_ids"]]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(ids) + len(bos) < page + 1:
        raise DataError(
            f"the calibration text has {len(ids)} tokens, less than a page of {page}. Give some 100 kB of text."
        )
    if length <= page:
        raise DataError(f"rows of {length} tokens are no longer than a page of {page}. Use {page + 1} or more.")
    body = min(length - len(bos), len(ids))
    rows = [bos + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    return torch.tensor(rows)


def checked_rows(batches: Tensor | Sequence[Tensor], page: int) -> Int[Tensor, "rows length"]:
    """Token rows as given: [rows, length], or a sequence of such batches of one length."""
    if not isinstance(batches, Tensor):
        widths = {b.shape[-1] if b.dim() in (1, 2) else -1 for b in batches}
        if len(widths) != 1 or -1 in widths:
            raise DataError(f"token batches have lengths {sorted(widths)[:4]}. Give rows [rows, length] of one length.")
        batches = torch.cat([torch.atleast_2d(b) for b in batches])
    rows = batches
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise DataError(f"token batches are {rows.dtype}. Give whole numbers: what a tokenizer gives.")
    if rows.dim() != 2 or rows.numel() == 0 or rows.shape[1] < page + 1:
        raise DataError(
            f"token batches have shape {tuple(rows.shape)}; give [rows, length] with length above a page of {page}."
        )
    return rows


def rows_hash(rows: Tensor) -> str:
    """Which calibration text it was, for the artifact's provenance."""
    ids = rows.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{tuple(rows.shape)}".encode() + ids).hexdigest()[:16]
