"""Trellis-coded quantisation of a unit normal: the same bits as a scalar code, a quarter less squared error and more.

Marcellin and Fischer, IEEE Trans. Commun. 38 (1990), with Ungerboeck's code of 16 states; a trellis for LLM weights is
QTIP's (arXiv 2406.11235). At b bits there are 2^(b+1) levels in 4 interleaved subsets. Of a code the lowest bit is
coded: the subset follows from it and the four coded bits before it. The other b - 1 bits choose among the subset's
levels. So a number has a level from twice as many, and only the encoder has to search.

A path is the tokens of one channel in one page, and closed: before its first token stands its last one. A page is then
read by itself, and nothing is stored beside the codes.
"""

from functools import cache

import torch
from torch import Tensor

from kvshrink.shapes import Float, Int, UInt8

STATES = 16  # what the last four coded bits can be
SUBSETS = 4
BITS = (1, 2, 3, 4)
AT_ONCE = 4096  # paths that are searched together

# The positive half of the levels, found by Lloyd's iteration over closed paths of 32 tokens, and their squared errors.
HALF = {
    1: (0.30823, 1.208),
    2: (0.18583, 0.58503, 1.05595, 1.8647),
    3: (0.10327, 0.30579, 0.52416, 0.75512, 1.01896, 1.34493, 1.79716, 2.49865),
    4: (
        *(0.05908, 0.17441, 0.29377, 0.41241, 0.53634, 0.66175, 0.79447, 0.93216),
        *(1.0805, 1.2404, 1.41957, 1.62611, 1.87144, 2.17135, 2.56047, 3.1509),
    ),
}
ERRORS = {1: 0.29975, 2: 0.08457, 3: 0.02309, 4: 0.00621}


@cache
def levels(bits: int) -> Float[Tensor, " levels"]:
    """The 2^(bits + 1) levels from the lowest to the highest, float64; number i is in subset i % 4."""
    half = torch.tensor(HALF[bits], dtype=torch.float64)
    return torch.cat([-half.flip(0), half])


def expected_error(bits: int) -> float:
    """Mean squared error of unit normal numbers in pages of 32 tokens."""
    return ERRORS[bits]


def to_indices(codes: UInt8[Tensor, "*outer page r"]) -> UInt8[Tensor, "*outer page r"]:
    """The number of each code's level."""
    coded = codes & 1
    before = {n: coded.roll(n, -2) for n in (1, 2, 4)}
    subset = (coded ^ before[1] ^ before[4]) << 1 | before[2]
    return (codes >> 1 << 2) | subset


def from_codes(codes: UInt8[Tensor, "*outer page r"], bits: int) -> Float[Tensor, "*outer page r"]:
    """Float32 levels of the codes."""
    table = levels(bits).to(codes.device, torch.float32)
    return table.index_select(0, to_indices(codes).flatten().int()).view(codes.shape)


def to_codes(x: Float[Tensor, "*outer page r"], bits: int) -> UInt8[Tensor, "*outer page r"]:
    """The codes of least squared error of each path, by Viterbi's search from every first state."""
    table = levels(bits).to(x.device, torch.float32)
    paths = x.float().transpose(-2, -1)
    flat = paths.reshape(-1, paths.shape[-1])
    found = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    for part, out in zip(flat.split(AT_ONCE), found.split(AT_ONCE), strict=True):
        # [n, page, subset]: the cost of each subset's nearest level, and which it is
        cost, level = (part[..., None] - table).square().unflatten(-1, (-1, SUBSETS)).min(-2)
        coded, subset = _search(cost)
        out.copy_(level.gather(-1, subset[..., None])[..., 0] << 1 | coded)
    codes: Tensor = found.view(paths.shape).transpose(-2, -1)
    return codes


def _search(cost: Float[Tensor, "n page 4"]) -> tuple[Int[Tensor, "n page"], Int[Tensor, "n page"]]:
    """(coded bits, subsets) of the closed path of least cost."""
    n, page = cost.shape[:2]
    state = torch.arange(STATES, device=cost.device)
    before = torch.stack([state >> 1, (state >> 1) + STATES // 2])  # the two states that may come before
    subsets = _subset(torch.stack([state, state + STATES]))
    total = torch.full((n, STATES, STATES), 1e30, device=cost.device)  # [n, first state, state]
    total.diagonal(dim1=1, dim2=2).zero_()
    ways = []
    for t in range(page):
        low, high = (total[..., b] + cost[:, t, s][:, None] for b, s in zip(before, subsets, strict=True))
        ways.append(high < low)
        total = torch.where(ways[-1], high, low)
    first = total.diagonal(dim1=1, dim2=2).argmin(1)
    rows, at, coded = torch.arange(n, device=cost.device), first, []
    windows = []
    for way in reversed(ways):
        windows.append(at + STATES * way[rows, first, at])
        coded.append(at & 1)
        at = windows[-1] >> 1
    return torch.stack(coded[::-1], 1), _subset(torch.stack(windows[::-1], 1))


def _subset(window: Int[Tensor, "*all"]) -> Int[Tensor, "*all"]:
    """After the last five coded bits, the newest lowest: Ungerboeck's parity checks 23 and 04, octal."""
    return ((window ^ window >> 1 ^ window >> 4) & 1) << 1 | (window >> 2 & 1)
