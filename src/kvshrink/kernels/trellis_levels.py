"""The levels of a trellis code of unit normal numbers, and how codes are read. kernels/trellis finds the codes.

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

from kvshrink.kernels.normal.reference import in_bytes
from kvshrink.shapes import Float, Int, UInt8

STATES = 16  # what the last four coded bits can be
SUBSETS = 4
BITS = (1, 2, 3, 4)

# The positive half of the levels, found by Lloyd's iteration over closed paths of 32 tokens, and their squared errors,
# both before `in_bytes`, which adds a hundredth at 4 bits.
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
    """The 2^(bits + 1) levels from the lowest to the highest, float64, in_bytes; number i is in subset i % 4."""
    half = in_bytes(torch.tensor(HALF[bits], dtype=torch.float64))
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


def subset_of(window: Int[Tensor, "*all"]) -> Int[Tensor, "*all"]:
    """After the last five coded bits, the newest lowest: Ungerboeck's parity checks 23 and 04, octal."""
    return ((window ^ window >> 1 ^ window >> 4) & 1) << 1 | (window >> 2 & 1)
