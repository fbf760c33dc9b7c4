"""Scores of a tile of keys: products with their latents as they are, or with keys rebuilt and turned in registers.

The channels of a key come as three lists: the first and the second of each pair that RoPE turns, and those that it
leaves. Each list is a product of its own, so that turning needs no exchange between threads and both layouts of pairs
("half", "interleaved") differ only in the lists. Latents come in chunks of C channels where there are many.
"""

from typing import no_type_check

import triton
import triton.language as tl

from kvshrink.kernels.decode.gpu.angles import angles
from kvshrink.kernels.decode.gpu.tiles import latents, multiply, rounded


@triton.jit
@no_type_check
def products(
    asked, alive, keys, records, member,
    FORM: tl.constexpr, BITS: tl.constexpr, DATA: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    SHARE: tl.constexpr, DTYPE: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scores [P * T, ROWS] with latents that are keys themselves."""
    scores = tl.zeros((P * T, ROWS), tl.float32)
    for at in range(0, WIDTH, C):
        channel = at + tl.arange(0, C)
        z = latents(keys, records, member, at, FORM, BITS, DATA, ALIGN, WIDTH, SHARE, DTYPE, P, T, C)
        scores = multiply(z, _rows(asked, alive, channel, channel < WIDTH, DTYPE), scores)
    return scores


@triton.jit
@no_type_check
def turned(
    asked, alive, keys, up, basis, mean, positions, inv_freq, scaling,
    records, member, head, heads, token, there,
    FORM: tl.constexpr, BITS: tl.constexpr, DATA: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scores [P * T, ROWS] with rebuilt keys: z @ up + mean, turned by the angles of their tokens' positions.

    basis: from `columns`, if the latents are one chunk.
    """
    one, two, rest = lists(D, PAIRS, INTERLEAVED)
    pair = tl.arange(0, one.shape[0])
    means = mean + head.to(tl.int64) * D  # [G, a] is [h, d]
    if PAIRS > 0:
        a = _start(means, one, pair < PAIRS, P * T)
        b = _start(means, two, pair < PAIRS, P * T)
    if 2 * PAIRS < D:
        still = _start(means, rest, rest < D, P * T)
    for at in range(0, WIDTH, C):
        z = latents(keys, records, member, at, FORM, BITS, DATA, ALIGN, WIDTH, SHARE, DTYPE, P, T, C)
        part = basis
        if WIDTH > C:
            part = columns(up, head, heads, at, WIDTH, GROUPS, D, PAIRS, INTERLEAVED, DTYPE, C)
        if PAIRS > 0:
            a = multiply(z, part[0], a)
            b = multiply(z, part[1], b)
        if 2 * PAIRS < D:
            still = multiply(z, part[2], still)

    scores = tl.zeros((P * T, ROWS), tl.float32)
    if PAIRS > 0:
        cos, sin = angles(positions, inv_freq, token, there, pair, PAIRS)
        cos, sin = cos * scaling, sin * scaling
        first, second = rounded(a * cos - b * sin, DTYPE), rounded(b * cos + a * sin, DTYPE)
        scores = multiply(first, _rows(asked, alive, one, pair < PAIRS, DTYPE), scores)
        scores = multiply(second, _rows(asked, alive, two, pair < PAIRS, DTYPE), scores)
    if 2 * PAIRS < D:
        scores = multiply(rounded(still, DTYPE), _rows(asked, alive, rest, rest < D, DTYPE), scores)
    return scores


@triton.jit
@no_type_check
def columns(
    up, head, heads, first,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A head's part of the basis [C, channels] for each list of channels, from latent `first` on."""
    one, two, rest = lists(D, PAIRS, INTERLEAVED)
    pair = tl.arange(0, one.shape[0])
    members = heads // GROUPS
    latent = first + tl.arange(0, C)[:, None]
    start = up + (head // members).to(tl.int64) * WIDTH * members * D + head % members * D + latent * members * D
    known = latent < WIDTH
    a, b, still = 0, 0, 0
    if PAIRS > 0:
        a = rounded(tl.load(start + one[None, :], mask=known & (pair < PAIRS)[None, :], other=0.0), DTYPE)
        b = rounded(tl.load(start + two[None, :], mask=known & (pair < PAIRS)[None, :], other=0.0), DTYPE)
    if 2 * PAIRS < D:
        still = rounded(tl.load(start + rest[None, :], mask=known & (rest < D)[None, :], other=0.0), DTYPE)
    return a, b, still


@triton.jit
@no_type_check
def lists(D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channels that are first and second of a pair, and those that do not turn, each filled to a tile's width."""
    F: tl.constexpr = _padded(PAIRS)
    pair = tl.arange(0, F)
    one = 2 * pair if INTERLEAVED else pair
    two = one + (1 if INTERLEAVED else PAIRS)
    R: tl.constexpr = _padded(D - 2 * PAIRS)
    return one, two, 2 * PAIRS + tl.arange(0, R)


@triton.jit
@no_type_check
def _start(means, channel, known, TOKENS: tl.constexpr):
    """The mean of some channels, for every token: what products are added to."""
    return tl.zeros((TOKENS, 1), tl.float32) + tl.load(means + channel, mask=known, other=0.0).to(tl.float32)[None, :]


@triton.jit
@no_type_check
def _rows(asked, alive, channel, known, DTYPE: tl.constexpr):
    """Queries [channels, ROWS], 0 where there is no such row or channel."""
    return rounded(tl.load(asked + channel[:, None], mask=alive[None, :] & known[:, None], other=0.0), DTYPE)


@triton.constexpr_function
@no_type_check
def _padded(count):
    """The width of a tile that holds so many channels: a power of two that a product takes."""
    return max(16, triton.next_power_of_2(count))
