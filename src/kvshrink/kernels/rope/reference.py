"""Rotary position embedding (arXiv 2104.09864) on the first 2 * f channels of a head; the rest passes through.

Two layouts exist: "half" pairs channel i with i + f (Llama and most), "interleaved" pairs 2i with 2i + 1 (GLM, Cohere).
"""

import torch
from torch import Tensor

from kvshrink.shapes import Float


def rotate(
    x: Float[Tensor, "b h t d"],
    cos: Float[Tensor, "#b t f"],
    sin: Float[Tensor, "#b t f"],
    interleaved: bool,
    inverse: bool,
) -> Float[Tensor, "b h t d"]:
    """x rotated by the angles of cos and sin, in float32. cos and sin carry the attention scaling m of YaRN.

    The inverse divides by m^2, so that rotate(inverse) of rotate is x again.
    """
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    if inverse:
        norm = cos.square() + sin.square()
        cos, sin = cos / norm, -sin / norm
    if torch.is_grad_enabled() and x.requires_grad:
        return _with_gradient(x.float(), cos, sin, interleaved)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if interleaved:
        a, b = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        a, b = slice(0, pairs), slice(pairs, 2 * pairs)
    xa, xb = x[..., a].float(), x[..., b].float()
    # written in place: this runs over every key of the body in every decode step
    torch.mul(xa, cos, out=out[..., a]).addcmul_(xb, sin, value=-1)
    torch.mul(xb, cos, out=out[..., b]).addcmul_(xa, sin)
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    return out


def waves(
    query: Float[Tensor, "b h x d"], part: Float[Tensor, "h d"], pairs: int, interleaved: bool
) -> Float[Tensor, "b h x w"]:
    """What a part that all keys have before RoPE adds to scores, q . R(a) m = (q . m) cos a + (q x m) sin a: factors of
    each pair's cosine, of each one's sine, and of what does not turn, w = 2 * pairs + 1."""
    if interleaved:
        a, b = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        a, b = slice(0, pairs), slice(pairs, 2 * pairs)
    m, rest = part[:, None], slice(2 * pairs, None)
    even = query[..., a] * m[..., a] + query[..., b] * m[..., b]
    odd = query[..., b] * m[..., a] - query[..., a] * m[..., b]
    return torch.cat([even, odd, (query[..., rest] * m[..., rest]).sum(-1, keepdim=True)], -1)


def wave_table(cos: Float[Tensor, "b t f"], sin: Float[Tensor, "b t f"]) -> Float[Tensor, "b 1 t w"]:
    """What the factors of `waves` are multiplied with at each token."""
    return torch.cat([cos, sin, cos.new_ones(*cos.shape[:2], 1)], -1)[:, None]


def _with_gradient(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The same for training: autograd takes nothing that is written in place."""
    pairs = cos.shape[-1]
    turning, rest = x.split([2 * pairs, x.shape[-1] - 2 * pairs], -1)
    a, b = turning.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1), rest], -1)
