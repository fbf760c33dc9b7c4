"""Recent tokens as a window holds them: in the model's dtype, or at 8 bits with a scale per token and KV head.

A token of 8 bits is d codes and, behind them, its scale as bfloat16: its range is float32's, so that no token is too
small or too large. Attention to them, and to the sinks before them, is one segment of a step (kernels/attention).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels.attention import finish, fold, start
from kvshrink.shapes import Bool, Float, Int, UInt8

LARGEST = 127  # of a code
SCALE = torch.bfloat16
HALF = torch.finfo(torch.float16).max
TINY = 1e-30  # a token of zeros has no scale of its own


class Placed(NamedTuple):
    """Rows that lie anywhere in one run of memory, as an engine's blocks do.

    first: one token's row of every head, from which the others are counted; at: bytes from it to each token's row, a
    multiple of the size of a number; -1: a row of the batch has no such token.
    """

    first: Float[Tensor, "h d"]
    at: Int[Tensor, "b t"]

    def rows(self) -> Float[Tensor, "b h t d"]:
        """Copies; zeros of a token that is not there, since there may be anything in its place."""
        first, device = self.first, self.first.device
        heads, channels = (torch.arange(n, device=device) for n in first.shape)
        heads, channels = heads * first.stride(0), channels * first.stride(1)
        tokens = self.at.clamp_min(0).to(device) // first.itemsize + int(first.storage_offset())
        index = tokens[:, None, :, None] + heads[:, None, None] + channels
        every = first.as_strided((int(first.untyped_storage().nbytes()) // first.itemsize,), (1,), 0)
        found: Tensor = every[index].masked_fill(~self.there.transpose(2, 3), 0.0)
        return found

    @property
    def there(self) -> Bool[Tensor, "b 1 1 t"]:
        return (self.at >= 0)[:, None, None].to(self.first.device)


def rounded(rows: Float[Tensor, "b h w d"]) -> UInt8[Tensor, "b h w n"]:
    """Rows at 8 bits: d codes and two bytes of scale."""
    rows = rows.float()
    scale = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(TINY).to(SCALE)
    codes = (rows / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], -1)


def unrounded(stored: UInt8[Tensor, "b h w n"], dtype: torch.dtype) -> Float[Tensor, "b h w d"]:
    """Rows from what `rounded` gave; zeros from bytes of zero."""
    codes, scale = stored.split([stored.shape[-1] - SCALE.itemsize, SCALE.itemsize], -1)
    found: Tensor = codes.view(torch.int8) * scale.contiguous().view(SCALE).float()
    if dtype == torch.float16:  # a scale that was rounded up may lead beyond its range
        found = found.clamp(-HALF, HALF)
    return found.to(dtype)


def attend(
    query: Float[Tensor, "b h x d"],
    keys: Tensor | Placed,
    values: Tensor | Placed,
    sinks: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b h x e"], Float[Tensor, "b h x 1"]]:
    """(output, log-sum-exp) of attention to the sinks and all held tokens. query: scaled, float32.

    keys, values: [b, h, w, d] of the model's dtype, or bytes as `rounded` gives them, or placed. sinks: keys and values
    in dtype. A row that has no token gives 0 and -inf.
    """
    seen = keys.there if isinstance(keys, Placed) else None
    keys, values = (x.rows() if isinstance(x, Placed) else x for x in (keys, values))
    keys, values = (unrounded(x, dtype) if x.dtype == torch.uint8 else x for x in (keys, values))
    if sinks is not None:
        assert seen is None
        keys, values = torch.cat([sinks[0], keys], 2), torch.cat([sinks[1], values], 2)
    keys, values = keys.float(), values.float()
    return finish(fold(start(query, values.shape[3]), query, keys, values, seen, softcap))
