"""The programs of `triton.py`: one for a tile of queries of one head, one for a tile of keys of one KV head."""

from typing import no_type_check

import triton
import triton.language as tl

from kvshrink.kernels.decode.gpu.tiles import multiply


@triton.jit
@no_type_check
def scores_of(
    query, keys, ends, real, batch, head, at, column, X, T,
    D: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[rows, keys] of one member of a head's group: -inf where a query does not see a key, or there is none."""
    channel = tl.arange(0, C)
    inside = (at[:, None] < X) & (channel < D)
    mine = tl.load(query + at[:, None].to(tl.int64) * D + channel, inside, 0.0)
    theirs = tl.load(
        keys + head.to(tl.int64) * T * D + column[None].to(tl.int64) * D + channel[:, None],
        (column[None] < T) & (channel[:, None] < D),
        0.0,
    )
    end = tl.load(ends + at, at < X, 0)
    seen = (column[None] < end[:, None]) & (column[None] < T)
    if REAL:
        there = tl.load(real + batch * T + column, column < T, 0)
        seen &= there[None] != 0
        theirs = tl.where(there[None] != 0, theirs, 0.0)  # what stands at pads may be no number
    return tl.where(seen, multiply(mine, theirs, tl.zeros((R, K), tl.float32)), float("-inf"))


@triton.jit
@no_type_check
def sums(
    query, keys, ends, real, out, H, M, X, T,
    D: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [b, h, m, x]: the logarithm of each query's sum."""
    group = tl.program_id(1)
    head = group // M
    at = tl.program_id(0) * R + tl.arange(0, R)
    most, total = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    stop = tl.load(ends + tl.minimum((tl.program_id(0) + 1) * R, X) - 1)
    for start in range(0, stop, K):
        part = scores_of(
            query + group.to(tl.int64) * X * D,
            keys,
            ends,
            real,
            head // H,
            head,
            at,
            start + tl.arange(0, K),
            X,
            T,
            D,
            C,
            REAL,
            R,
            K,
        )
        higher = tl.maximum(most, tl.max(part, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - base) + tl.sum(tl.exp(part - base[:, None]), 1)
        most = higher
    tl.store(
        out + group.to(tl.int64) * X + at,
        tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-30)), float("inf")),
        at < X,
    )


@triton.jit
@no_type_check
def columns(
    query, keys, ends, real, lse, weights, first, out, H, M, X, T,
    D: tl.constexpr, C: tl.constexpr, REAL: tl.constexpr, MOST: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [b, h, t]; first: of each tile of keys, the first query that sees any of them."""
    head = tl.program_id(1)
    batch = head // H
    column = tl.program_id(0) * K + tl.arange(0, K)
    got = tl.zeros((K,), tl.float32)
    for member in range(M):
        group = head.to(tl.int64) * M + member
        for start in range(tl.load(first + tl.program_id(0)), X, R):
            at = start + tl.arange(0, R)
            part = scores_of(query + group * X * D, keys, ends, real, batch, head, at, column, X, T, D, C, REAL, R, K)
            whole = tl.load(lse + group * X + at, at < X, float("inf"))
            weight = tl.load(weights + batch * X + at, at < X, 0.0)
            own = tl.where((part > float("-inf")) & (weight[:, None] > 0), tl.exp(part - whole[:, None]), 0.0)
            own = own * weight[:, None]
            got = tl.maximum(got, tl.max(own, 0)) if MOST else got + tl.sum(own, 0)
    tl.store(out + head.to(tl.int64) * T + column, got, column < T)
