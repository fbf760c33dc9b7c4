"""What keys get of the attention of many queries: their columns of the matrix of probabilities, summed up or the most
of each, without that matrix. A tile of scores of some queries is all that is ever there.

Of each query first the logarithm of its sum, then the mass: softmax must be complete before a column counts.
"""

import torch
from torch import Tensor

from kvshrink.kernels.score_tiles import gather, scored
from kvshrink.shapes import Bool, Float, Int

TILE = 2**22  # scores alive at a time


def mass(
    queries: Float[Tensor, "b h m x d"],
    keys: Float[Tensor, "b h t d"],
    ends: Int[Tensor, " x"],
    weights: Float[Tensor, " x"] | None = None,
    real: Bool[Tensor, "b t"] | None = None,
    asks: Bool[Tensor, "b x"] | None = None,
    most: bool = False,
) -> Float[Tensor, "b h t"]:
    """Of queries times attention's scale, each of which sees the first `ends` keys; ends in order.

    weights: of each query. real: which keys are tokens; asks: which queries are. most: the most that any query gives,
    not the sum.
    """
    out = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    for heads, at, end, rounded in scored(queries, keys, ends, TILE):
        scores = rounded.float()
        scores.masked_fill_(torch.arange(end, device=keys.device) >= ends[at, None], -torch.inf)
        if real is not None:
            scores.masked_fill_(~real[:, None, None, None, :end], -torch.inf)
        found = scores.softmax(-1)
        if real is not None:
            found = found.nan_to_num(0.0)  # of queries that see nothing
        if asks is not None:
            found = found.masked_fill(~asks[:, None, None, at, None], 0.0)
        if weights is not None:
            found = found * weights[at, None]
        gather(out[:, heads, :end], found.amax((2, 3)) if most else found.sum((2, 3)), most)
    return out
