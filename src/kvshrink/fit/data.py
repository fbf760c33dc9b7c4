"""Calibration text to token rows of equal length."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.shapes import Int


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
        widths = {b.shape[-1] for b in batches}
        if len(widths) != 1:
            raise DataError(f"token batches have lengths {sorted(widths)[:4]}. Give rows of one length.")
        batches = torch.cat([torch.atleast_2d(b) for b in batches])
    rows = batches
    if rows.dim() != 2 or rows.numel() == 0 or rows.shape[1] < page + 1:
        raise DataError(
            f"token batches have shape {tuple(rows.shape)}; give [rows, length] with length above a page of {page}."
        )
    return rows


def rows_hash(rows: Tensor) -> str:
    """Which calibration text it was, for the artifact's provenance."""
    ids = rows.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{tuple(rows.shape)}".encode() + ids).hexdigest()[:16]
