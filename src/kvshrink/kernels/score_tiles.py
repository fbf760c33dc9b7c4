"""Scores of many queries with keys, a tile at a time: what is gone through by kernels that sum up columns."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvshrink.shapes import Float, Int

FEW = 128  # keys, up to which all heads go together


def gather(into: Float[Tensor, "b h t"], found: Float[Tensor, "b h t"], most: bool) -> None:
    into.copy_(torch.maximum(into, found) if most else into + found)


def scored(
    queries: Float[Tensor, "b h m x d"], keys: Float[Tensor, "b h t d"], ends: Int[Tensor, " x"], most: int
) -> Iterator[tuple[slice, slice, int, Float[Tensor, "b h m x t"]]]:
    """(heads, queries, how many keys, their scores in the keys' dtype), a tile of at most so many scores at a time.

    The next tile's scores take the place of these: fresh memory must be cleared by the system, which takes as long as
    the product.
    """
    parts = tiles(queries, keys, ends, most)
    size = max((queries[:, heads, :, at, 0].numel() * end for heads, at, end in parts), default=0)
    room = torch.empty(size, dtype=keys.dtype, device=keys.device)
    several, last = len(parts) > len({heads.start for heads, _, _ in parts}), None
    for heads, at, end in parts:
        if heads != last:
            last, turned = heads, keys[:, heads].flatten(0, 1).transpose(1, 2)
            if several:  # each product would gather them from among the other heads' again
                turned = turned.contiguous()
        part = queries[:, heads, :, at]
        b, h, m, x, d = part.shape
        flat = part.reshape(b * h, m * x, d).to(keys.dtype)
        out = room[: part[..., 0].numel() * end].view(b * h, m * x, end)
        yield heads, at, end, torch.bmm(flat, turned[..., :end], out=out).view(b, h, m, x, end)


def tiles(queries: Tensor, keys: Tensor, ends: Int[Tensor, " x"], most: int) -> list[tuple[slice, slice, int]]:
    """(heads, queries, how many keys the last of them sees), so that no tile has more than so many scores."""
    b, h, m, x, _ = queries.shape
    last = ends.tolist() or [0]
    if b * h * m * x * last[-1] <= most and last[-1] <= FEW:
        return [(slice(None), slice(None), last[-1])]
    step = max(1, min(x, most // (b * m * last[-1])))
    parts = [(slice(at, at + step), last[min(x, at + step) - 1]) for at in range(0, x, step)]
    return [(slice(head, head + 1), *part) for head in range(h) for part in parts]  # no copy of all heads' keys
