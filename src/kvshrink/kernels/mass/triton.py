"""What `reference.py` does as two Triton programs for CUDA devices: no tile of scores leaves a processor.

The first goes along the keys of some queries and leaves the logarithm of each one's sum; the second goes along the
queries that see some keys, makes their scores again and adds up the columns. Products are of the keys' dtype, sums
float32.
"""

import torch
import triton
from torch import Tensor

from kvshrink.kernels.mass.gpu.columns import columns, sums
from kvshrink.shapes import Bool, Float, Int

ROWS, KEYS = 64, 64  # of a tile


def mass(
    queries: Float[Tensor, "b h m x d"],
    keys: Float[Tensor, "b h t d"],
    ends: Int[Tensor, " x"],
    weights: Float[Tensor, " x"] | None = None,
    real: Bool[Tensor, "b t"] | None = None,
    asks: Bool[Tensor, "b x"] | None = None,
    most: bool = False,
) -> Float[Tensor, "b h t"]:
    """As the reference. Weights are not below 0."""
    b, h, m, x, d = queries.shape
    t, device = keys.shape[2], keys.device
    out, lse = (torch.empty(*shape, dtype=torch.float32, device=device) for shape in ((b, h, t), (b, h, m, x)))
    ends = ends.to(device, torch.int32).contiguous()
    each = torch.ones(x, dtype=torch.float32, device=device) if weights is None else weights.to(device, torch.float32)
    each = each.expand(b, x) if asks is None else each * asks.to(device)
    # the first query that sees the first key of a tile
    first = torch.searchsorted(ends, torch.arange(0, t, KEYS, device=device, dtype=torch.int32), right=True).int()
    given = [
        queries.to(keys.dtype).contiguous(),
        keys.contiguous(),
        ends,
        ends if real is None else real.to(torch.uint8).contiguous(),
    ]
    sizes = {"D": d, "C": max(16, triton.next_power_of_2(d)), "REAL": real is not None, "R": ROWS, "K": KEYS}
    with torch.cuda.device_of(keys):
        sums[(triton.cdiv(x, ROWS), b * h * m)](*given, lse, h, m, x, t, **sizes)
        more = (lse, each.contiguous(), first, out)
        columns[(triton.cdiv(t, KEYS), b * h)](*given, *more, h, m, x, t, MOST=most, **sizes)
    return out
