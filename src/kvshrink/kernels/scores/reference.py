"""Scores of a few queries with stored keys, before softmax, as one operation: what tokens are ranked by.

As `kernels/decode`, without values: the same keys, the same masks.
"""

import torch
from torch import Tensor

from kvshrink.kernels.decode.reference import ALL, Basis, Constant, Live, Turn
from kvshrink.kernels.decode.reference import _rows as rows_of
from kvshrink.kernels.latents import Packed
from kvshrink.shapes import Float


def scores(
    query: Float[Tensor, "b h x e"],
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    softcap: float | None,
    precision: torch.dtype,
    live: Live = ALL,
    constant: Constant | None = None,
) -> Float[Tensor, "b h x t"]:
    """Of all slots of these pages; -inf where a slot holds no token that is read. Arguments are those of `decode`."""
    rows, query = rows_of(query, keys, basis, turn, constant)
    found = query @ rows.repeat_interleave(query.shape[1] // rows.shape[1], 1).transpose(2, 3)
    if softcap is not None:
        found = torch.tanh(found / softcap) * softcap
    there = live.seen(keys)
    if there is not None:
        found = found.masked_fill(~there.repeat_interleave(query.shape[1] // there.shape[1], 1), -torch.inf)
    return found
