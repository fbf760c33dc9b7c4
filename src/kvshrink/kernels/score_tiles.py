"""Scores of many queries with keys, a tile at a time: what is gone through by kernels that sum up columns."""

import torch
from torch import Tensor

from kvshrink.shapes import Float, Int

FEW = 128  # keys, up to which all heads go together


def gather(into: Float[Tensor, "b h t"], found: Float[Tensor, "b h t"], most: bool) -> None:
    into.copy_(torch.maximum(into, found) if most else into + found)


def score(
    queries: Tensor, keys: Tensor, heads: slice, at: slice, end: int, room: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "b h m x t"]:
    """Of some queries of some heads with the first keys, in the keys' dtype. room: memory to make them in."""
    part = queries[:, heads, :, at]
    b, h, m, x, d = part.shape
    flat, of_keys = part.reshape(b * h, m * x, d).to(keys.dtype), keys[:, heads, :end].flatten(0, 1).transpose(1, 2)
    if room is None:
        return (flat @ of_keys).view(b, h, m, x, end)
    out = room[: flat.shape[0] * flat.shape[1] * end].view(b * h, m * x, end)
    return torch.bmm(flat, of_keys, out=out).view(b, h, m, x, end)


def tiles(queries: Tensor, keys: Tensor, ends: Int[Tensor, " x"], most: int) -> list[tuple[slice, slice, int]]:
    """(heads, queries, how many keys the last of them sees), so that no tile has more than so many scores."""
    b, h, m, x, _ = queries.shape
    last = ends.tolist() or [0]
    if b * h * m * x * last[-1] <= most and last[-1] <= FEW:
        return [(slice(None), slice(None), last[-1])]
    step = max(1, min(x, most // (b * m * last[-1])))
    parts = [(slice(at, at + step), last[min(x, at + step) - 1]) for at in range(0, x, step)]
    return [(slice(head, head + 1), *part) for head in range(h) for part in parts]  # no copy of all heads' keys
