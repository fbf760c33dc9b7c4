"""Attention of one new token to full keys and values on a CPU: where torch's sdpa is slow, our kernel reads them.

Without a mask transformers asks sdpa for a product per query head, which reads a KV head again for each of them. Here
the query heads of a KV head are rows of one product (kernels/decode, the "raw" form). At Llama-3.1-8B's shape, 32k
tokens and bfloat16 that attention is nine times faster; sums are float32 in both. See bench/results/decode.json.
"""

import torch
from torch import Tensor

from kvshrink.kernels.attention import finish, fold, merge, start
from kvshrink.kernels.decode import MOST_ROWS, fused
from kvshrink.kernels.decode.cpu import PAGE
from kvshrink.kernels.held import attend as attend_held
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.records import Rows
from kvshrink.shapes import Bool, Float

FEW = 256  # tokens that are read as they lie, at less fixed cost
FEWEST = 1024  # tokens from which float32 gains; 16-bit floats gain at any length


def grouped(
    query: Float[Tensor, "b q 1 d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Bool[Tensor, "#b #q 1 t"] | None,
    scaling: float | None,
) -> Float[Tensor, "b q 1 e"] | None:
    """The output; None where sdpa is as fast, or no kernel is there."""
    b, heads, _, d = query.shape
    h, t = keys.shape[1:3]
    whole = t // PAGE * PAGE
    if not whole or not _gains(query, keys, t):
        return None
    rows = query.float().mul(query.shape[-1] ** -0.5 if scaling is None else scaling).reshape(b, h, -1, d)
    if t <= FEW and mask is None and (part := attend_held(rows, keys, values, None, None, query.dtype)) is not None:
        return part[0].reshape(b, heads, 1, -1).to(query.dtype)
    pages = [Packed("raw", Rows.records(x, PAGE), x.shape[3], PAGE) for x in (keys, values)]
    kernel = fused(query.device, *pages).kernel
    if kernel is None:
        return None
    seen = None
    if mask is not None:
        seen = mask.expand(b, -1, -1, -1).reshape(b, *((1, 1) if mask.shape[1] == 1 else (h, heads // h)), t)
    parts = [kernel(rows, pages[0], None, None, pages[1], _upto(seen, 0, whole), None, query.dtype)]
    if whole < t:
        rest = keys[:, :, whole:], values[:, :, whole:]
        part = attend_held(rows, *rest, None, None, query.dtype) if seen is None else None
        parts.append(_folded(rows, *rest, _upto(seen, whole, t)) if part is None else part)
    return merge(parts).reshape(b, heads, 1, -1).to(query.dtype)


def _folded(rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    return finish(fold(start(rows, values.shape[3]), rows, keys.float(), values.float(), seen, None))


def _gains(query: Tensor, keys: Tensor, tokens: int) -> bool:
    rows = query.shape[1] // keys.shape[1]
    small = query.dtype in (torch.bfloat16, torch.float16) or (rows > 1 and tokens >= FEWEST)
    return small and rows <= MOST_ROWS and query.device.type == "cpu" and not torch.is_grad_enabled()


def _upto(seen: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if seen is None else seen[..., start:end]
