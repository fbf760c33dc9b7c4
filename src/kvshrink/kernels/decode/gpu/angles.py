"""Angles of RoPE for a tile of tokens, and their cosines and sines.

Both come from one reduction to an eighth of a turn and two short polynomials: CUDA's own functions reduce twice and
carry a branch for large angles, which made most of the code of a whole program and much of its time.
"""

from typing import no_type_check

import triton
import triton.language as tl

from kvshrink.kernels.decode.gpu.tiles import INTERPRETED

# pi / 2 as a float32 and what is left of it: n times the first is a multiple of 2^-23, so that with a fused
# multiply-add an angle less n times it is exact, for every n below 2^21
TWO_OVER_PI: tl.constexpr = tl.constexpr(0.6366197723675814)
QUARTER: tl.constexpr = tl.constexpr(1.57079637050628662109375)
QUARTER_REST: tl.constexpr = tl.constexpr(-4.37113900018624283e-8)


@triton.jit
@no_type_check
def angles(positions, inv_freq, token, there, pair, PAIRS: tl.constexpr):
    """cos and sin [tokens, pairs]; the product of position and frequency is float32, as the reference's is."""
    position = tl.load(positions + token, mask=there, other=0).to(tl.float32)
    frequency = tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
    return _cos_sin(position[:, None] * frequency[None, :])


@triton.jit
@no_type_check
def _cos_sin(angle):
    """To 2e-7, up to angles of 2^20. Polynomials of least error on [-pi/4, pi/4], as in Cephes' sinf and cosf."""
    quarters = tl.floor(angle * TWO_OVER_PI + 0.5)
    x = _fma(-quarters, QUARTER_REST, _fma(-quarters, QUARTER, angle))
    square = x * x
    sin = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * square + square * square * cos
    turns = quarters.to(tl.int32)
    odd = (turns & 1) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((turns + 1) & 2 != 0, -first, first), tl.where(turns & 2 != 0, -second, second)


@triton.jit
@no_type_check
def _fma(x, y, z):
    """x * y + z, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, tl.full(x.shape, y, tl.float32), z)
