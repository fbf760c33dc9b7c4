"""The trellis codes of least squared error of unit normal numbers. kernels/trellis_levels.py says what a code is.

The same bits as a scalar code, a quarter less squared error and more. A path is the tokens of one channel in one page.
"""

import torch
from torch import Tensor

from kvshrink.kernels.trellis_levels import STATES, SUBSETS, levels, subset_of
from kvshrink.shapes import Float, Int, UInt8

AT_ONCE = 4096  # paths that are searched together


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
    subsets = subset_of(torch.stack([state, state + STATES]))
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
    return torch.stack(coded[::-1], 1), subset_of(torch.stack(windows[::-1], 1))
