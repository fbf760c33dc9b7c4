"""Tiles of latents: unpacked and dequantised in registers. kernels/latents and kernels/pack say what is stored.

A tile is P pages of T tokens, so P * T rows, of C channels from channel `first` on. Each page's record is found by its
address, which is read once for a tile.
"""

from typing import no_type_check

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
@no_type_check
def lane(table, row, group, pages, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """(addresses of the records that a row has of a group, the group's index among those of a record)."""
    MEMBERS: tl.constexpr = GROUPS // LANES
    return table + (row * LANES + group // MEMBERS) * pages, group % MEMBERS


@triton.jit
@no_type_check
def addresses(own, page, end, P: tl.constexpr):
    """[P], of the records of pages from `page` on; 0 where there is none, and from page `end` on."""
    at = page + tl.arange(0, P)
    return tl.load(own + at, mask=at < end, other=0)


@triton.jit
@no_type_check
def latents(
    side, records, member, first,
    FORM: tl.constexpr, BITS: tl.constexpr, DATA: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    SHARE: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """[P * T, C] in DTYPE, of records at these addresses; 0 where there is none, finite from channel WIDTH on."""
    exists = (records != 0)[:, None, None]
    token = tl.arange(0, T)[None, :, None]
    channel = first + tl.arange(0, C)[None, None, :]
    there = exists & (channel < WIDTH)
    data = _part(records, side.data, member, DATA, ALIGN)
    if FORM == "raw":
        tile = tl.load(data + (token * WIDTH + channel), mask=there, other=0.0)
    else:
        if FORM == "normal" or FORM == "trellis":
            codes = _levels(side, data, token, channel, there, FORM == "trellis", WIDTH, T)
        else:
            if BITS == 3:
                codes = _scattered(data, token, 0, WIDTH, channel, 3, there, T)
            else:
                codes = _planes(data, channel, there, BITS, WIDTH, P, T, C)
            codes = tl.load(side.levels + codes) if FORM == "table" else codes.to(tl.float32)
        # S neighbours have their numbers in common; they come as an axis, so that each number is read once
        S: tl.constexpr = _alike(SHARE, WIDTH, C)
        N: tl.constexpr = (WIDTH + SHARE - 1) // SHARE
        share = (first + tl.arange(0, C // S) * S)[None, None, :] // SHARE
        known = exists & (share < N)
        at = token * N + share if FORM == "token" or FORM == "table" else share
        scale = _part(records, side.scale, member, "float16", ALIGN) + at
        tile = (
            tl.reshape(codes, (P, T, C // S, S)) * tl.load(scale, mask=known, other=0.0).to(tl.float32)[:, :, :, None]
        )
        if FORM == "channel" or FORM == "token":
            low = _part(records, side.low, member, "float16", ALIGN) + at
            tile += tl.load(low, mask=known, other=0.0).to(tl.float32)[:, :, :, None]
    return tl.reshape(rounded(tile, DTYPE), (P * T, C))


@triton.jit
@no_type_check
def _part(records, at, member, KIND: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers [P, 1, 1] to a part of each record."""
    first = tl.multiple_of(records[:, None, None].to(_pointer("uint8")), (ALIGN, ALIGN, ALIGN))
    return (first + (at[0] + member.to(tl.int64) * at[1])).to(_pointer(KIND))


@triton.jit
@no_type_check
def _planes(
    data, channel, there, BITS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, T: tl.constexpr, C: tl.constexpr
):
    """Codes [P, T, C] of one run of 1, 2, 4 or 8 bits: byte j of m holds the codes j, j + m, ..., and m is a whole
    number of tokens, so that each byte is read once."""
    tokens: tl.constexpr = T * BITS // 8
    at = tl.arange(0, tokens)[None, :, None] * WIDTH + channel
    packed = tl.load(data + at, mask=there, other=0).to(tl.int32)
    shift = tl.arange(0, 8 // BITS)[None, :, None, None] * BITS
    codes = (packed[:, None, :, :] >> shift) & (2**BITS - 1)
    return tl.reshape(codes, (P, T, C))


@triton.jit
@no_type_check
def _levels(side, data, token, channel, there, TRELLIS: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr):
    """Levels [P, T, C], float32, of runs of different bits: a table says where each channel's codes lie."""
    known = channel < WIDTH
    base = tl.load(side.places + channel, mask=known, other=0)
    count = tl.load(side.places + (WIDTH + channel), mask=known, other=0)
    index = tl.load(side.places + (2 * WIDTH + channel), mask=known, other=0)
    bits = tl.load(side.places + (3 * WIDTH + channel), mask=known, other=8)
    codes = _scattered(data, token, base, count, index, bits, there, T)
    if TRELLIS:  # the subset follows from the coded bits of this token and of those before it, around the page
        one = _scattered(data, (token + T - 1) % T, base, count, index, bits, there, T)
        two = _scattered(data, (token + T - 2) % T, base, count, index, bits, there, T)
        four = _scattered(data, (token + T - 4) % T, base, count, index, bits, there, T)
        found = (codes >> 1 << 2) | (((codes ^ one ^ four) & 1) << 1) | (two & 1)
        codes = tl.where(bits == 8, codes, found)
    return tl.load(side.levels + (bits * 256 + codes), mask=there, other=0.0)


@triton.jit
@no_type_check
def _scattered(data, token, base, count, index, bits, there, T: tl.constexpr):
    """Codes [P, T, C], each found by itself: a channel is number `index` of `count` in a run that begins at `base`.
    Neighbours read the same byte again, from the cache."""
    bit = (token * count + index) * 3
    whole = T * bits // 8  # tokens of a plane: a power of two, but at 3 bits, which have no planes
    byte = base + tl.where(bits == 3, bit >> 3, (token & (whole - 1)) * count + index)
    shift = tl.where(bits == 3, bit & 7, (token * 8 // T) & -bits)
    word = tl.load(data + byte, mask=there, other=0).to(tl.int32)
    word |= tl.load(data + byte + 1, mask=there & (shift + bits > 8), other=0).to(tl.int32) << 8
    return (word >> shift) & ((1 << bits) - 1)


@triton.jit
@no_type_check
def multiply(a, b, total):
    """total + a @ b, summed in float32."""
    if INTERPRETED:  # in numpy, which knows no bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
@no_type_check
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, to the nearest."""
    x = x.to(tl.float32)
    if INTERPRETED and DTYPE == tl.bfloat16:  # where a plain conversion would cut
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.constexpr_function
@no_type_check
def _pointer(kind):
    return tl.pointer_type(getattr(tl, kind))


@triton.constexpr_function
@no_type_check
def _alike(share, width, tile):
    """Of a tile's channels, a power of two, how many in a row are sure to have their numbers in common."""
    if share >= width or share % tile == 0:
        return tile
    return share if share & (share - 1) == 0 else 1
