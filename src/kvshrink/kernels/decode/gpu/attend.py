"""Attention of one KV head's rows to a range of pages: one program per (batch row and KV head, range, block of rows).

A program goes over its range in tiles of P pages. It reads the latents of its head's group by itself: heads that share
a group read the same bytes at about the same time, so that all but one read them from the L2 cache, and each rebuilds
only its own keys. Rows are the last axis of everything: a rebuilt key then goes from one product into the next one in
registers, and both products have the many tokens or channels where tensor cores want 64 or more.
"""

from typing import no_type_check

import triton
import triton.language as tl

from kvshrink.kernels.decode.gpu.keys import columns, products, turned
from kvshrink.kernels.decode.gpu.tiles import addresses, lane, latents, multiply, rounded

# numbers and alignments that change while a sequence grows: a program must not be compiled again for each
MOVING = (
    *("x", "pages", "range_pages", "positions_row", "counts_row", "counts_lane"),
    *("visible_row", "visible_head", "visible_x", "added_row"),
)
SLIDING = ("key_table", "value_table", "positions", "counts", "skips", "visible", "added")


@triton.jit(do_not_specialize=MOVING, do_not_specialize_on_alignment=SLIDING)
@no_type_check
def attend(
    query, keys, key_table, up, mean, positions, inv_freq, values, value_table, counts, skips, visible, added, out, lse,
    heads, x, pages, range_pages, positions_row, counts_row, counts_lane, visible_row, visible_head, visible_x,
    added_row, scaling, softcap,
    K_FORM: tl.constexpr, K_BITS: tl.constexpr, K_DATA: tl.constexpr, K_ALIGN: tl.constexpr,
    K_WIDTH: tl.constexpr, K_GROUPS: tl.constexpr, K_LANES: tl.constexpr, K_SHARE: tl.constexpr,
    V_FORM: tl.constexpr, V_BITS: tl.constexpr, V_DATA: tl.constexpr, V_ALIGN: tl.constexpr,
    V_WIDTH: tl.constexpr, V_GROUPS: tl.constexpr, V_LANES: tl.constexpr, V_SHARE: tl.constexpr,
    REBUILT: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    CAPPED: tl.constexpr, COUNTED: tl.constexpr, SKIPPING: tl.constexpr, MASKED: tl.constexpr, ADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, K_CHUNK: tl.constexpr, V_ALL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out [b, h, ranges, x, V_WIDTH] and lse [b, h, ranges, x] of each range of `range_pages` pages, float32."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * range_pages
    end = tl.minimum(first + range_pages, pages)
    asked = query + (row * heads + head) * x * WIDE + rows.to(tl.int64)[None, :] * WIDE  # [1, ROWS]
    if MASKED:
        flags = visible + row * visible_row + head.to(tl.int64) * visible_head
        flags += rows.to(tl.int64)[None, :] * visible_x
    if ADDED:
        more = added + ((row * heads + head) * x + rows.to(tl.int64)[None, :]) * added_row
    if PAIRS > 0:
        positions += row * positions_row
    key_group = head * K_GROUPS // heads
    key_records, key_member = lane(key_table, row, key_group, pages, K_GROUPS, K_LANES)
    value_records, value_member = lane(value_table, row, head * V_GROUPS // heads, pages, V_GROUPS, V_LANES)
    if COUNTED:
        counts += row * counts_row + (key_group // (K_GROUPS // K_LANES)) * counts_lane
    if SKIPPING:
        skip = tl.load(skips + row)
        first = tl.maximum(first, (skip // (P * T) * P).to(tl.int64))  # a multiple of P, as it was

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((V_ALL, ROWS), tl.float32)
    basis = None
    if REBUILT and K_WIDTH <= K_CHUNK:
        basis = columns(up, head, heads, 0, K_WIDTH, K_GROUPS, WIDE, PAIRS, INTERLEAVED, DTYPE, K_CHUNK)
    # found a tile ahead, so that what they lead to can be read a tile ahead, too
    key_at, value_at = addresses(key_records, first, end, P), addresses(value_records, first, end, P)
    for page in range(first, end, P):
        token = page * T + tl.arange(0, P * T).to(tl.int64)
        if REBUILT:
            scores = turned(
                asked, rows < x, keys, up, basis, mean, positions, inv_freq, scaling,
                key_at, key_member, head, heads, token, token < end * T,
                K_FORM, K_BITS, K_DATA, K_ALIGN, K_WIDTH, K_GROUPS, K_SHARE,
                WIDE, PAIRS, INTERLEAVED, DTYPE, T, ROWS, K_CHUNK, P,
            )  # fmt: skip
        else:
            scores = products(
                asked, rows < x, keys, key_at, key_member,
                K_FORM, K_BITS, K_DATA, K_ALIGN, K_WIDTH, K_SHARE, DTYPE, T, ROWS, K_CHUNK, P,
            )  # fmt: skip
        if ADDED:
            inside = (token < end * T)[:, None] & (rows < x)[None, :]
            scores += tl.load(more + token[:, None], mask=inside, other=0.0)
        if CAPPED:
            # tanh, of which triton's language has none that every backend knows
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        filled = tl.where(key_at != 0, T, 0)
        if COUNTED:
            filled = tl.load(counts + page + tl.arange(0, P), mask=key_at != 0, other=0).to(tl.int32)
        seen = tl.reshape(tl.arange(0, T)[None, :] < filled[:, None], (P * T,))
        if SKIPPING:
            seen = seen & (token >= skip)
        seen = seen[:, None]
        if MASKED:
            seen = seen & (tl.load(flags + token[:, None], mask=seen & (rows < x)[None, :], other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))

        highest = tl.maximum(top, tl.max(scores, 0))
        # a row that has seen nothing yet: subtracting 0 instead of -inf keeps its weights 0 rather than NaN
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(scores - base[None, :])
        shrink = tl.exp(top - base)
        top, mass = highest, mass * shrink + tl.sum(weights, 0)
        z = latents(
            values, value_at, value_member, 0,
            V_FORM, V_BITS, V_DATA, V_ALIGN, V_WIDTH, V_SHARE, DTYPE, P, T, V_ALL,
        )  # fmt: skip
        total = multiply(tl.trans(z), rounded(weights, DTYPE), total * shrink[None, :])
        key_at, value_at = addresses(key_records, page + P, end, P), addresses(value_records, page + P, end, P)

    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * x + rows
    channel = tl.arange(0, V_ALL)[:, None]
    wanted = (channel < V_WIDTH) & (rows < x)[None, :]
    some = tl.maximum(mass, 1e-30)
    tl.store(out + (place[None, :] * V_WIDTH + channel), total / some[None, :], mask=wanted)
    tl.store(lse + place, tl.where(mass > 0, top + tl.log(some), float("-inf")), mask=rows < x)
