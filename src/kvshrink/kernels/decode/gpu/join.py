"""The ranges of a row of queries become one: outputs weighted by their log-sum-exp, 16 ranges at a time."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("x", "ranges"))
@no_type_check
def join(parts, lses, out, lse, x, ranges, WIDTH: tl.constexpr, C: tl.constexpr):
    """parts [n, ranges, x, WIDTH] and lses [n, ranges, x] to out [n, x, WIDTH] and lse [n, x], float32.

    A program makes C channels of one row. A row that saw nothing gives 0 and -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    first = row // x * ranges * x + row % x  # of this row's ranges, each x rows after the last
    channel = tl.program_id(1) * C + tl.arange(0, C)
    top, mass, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32), tl.zeros((C,), tl.float32)
    for at in range(0, ranges, 16):
        part = at + tl.arange(0, 16)
        place = first + part * x
        seen = tl.load(lses + place, mask=part < ranges, other=float("-inf"))
        highest = tl.maximum(top, tl.max(seen, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights, shrink = tl.exp(seen - base), tl.exp(top - base)
        known = (part < ranges)[:, None] & (channel < WIDTH)[None, :]
        tile = tl.load(parts + place[:, None] * WIDTH + channel[None, :], mask=known, other=0.0)
        total = total * shrink + tl.sum(tile * weights[:, None], 0)
        top, mass = highest, mass * shrink + tl.sum(weights, 0)
    tl.store(out + row * WIDTH + channel, total / tl.maximum(mass, 1e-30), mask=channel < WIDTH)
    # every program of the row writes the same number
    tl.store(lse + row, tl.where(mass > 0, top + tl.log(tl.maximum(mass, 1e-30)), float("-inf")))
