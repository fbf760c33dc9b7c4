"""Stored pages, bases and positions for the tests of decode kernels."""

import itertools
from dataclasses import replace

import numpy as np
import torch

from kvshrink.kernels.decode import Basis, Turn
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.normal.reference import levels
from kvshrink.kernels.records import recorded
from kvshrink.methods._packing import Affine, Codebook, Raw
from kvshrink.methods._packing.mixed import Mixed

FORMS = [
    "raw",
    *itertools.product(("channel", "token"), (1, 2, 3, 4, 8)),
    *itertools.product(("table",), (1, 2, 3, 4)),
    "normal",
]
PAGE = 32


def packed(
    form, groups: int, width: int, pages: int, b: int, dtype: torch.dtype, group: int = 64, page: int = PAGE
) -> Packed:
    """Random latents in this form, between pages of nothing but ones: NaN, and the highest codes."""
    rows = torch.randn(b, groups, (pages + 2) * page, width) + 0.3
    if form == "normal":
        sizes = (16,) * (width // 16) + ((width % 16,) if width % 16 else ())
        bits = sorted(([8, 4, 3, 2, 1] * len(sizes))[: len(sizes)], reverse=True)
        packing = Mixed(sizes, tuple(bits), page)
    elif form == "raw":
        packing = Raw(groups, width, page, dtype)
    elif form[0] == "table":
        packing = Codebook(groups, width, page, levels(form[1]).float(), "token", min(group, width), "absmax")
    else:
        packing = Affine(groups, width, page, form[1], form[0], min(group, width))
    records = recorded(packing.store(rows, None))
    for edge in (0, pages + 1):
        records.bytes[:, :, edge] = 255  # NaN as a float of any width
    return packing.packed(replace(records, start=1, stop=pages + 1))


def basis_of(groups: int, width: int, heads: int, d: int) -> Basis:
    a = heads // groups * d
    return Basis(torch.randn(groups, width, a) / width**0.5, torch.randn(groups, a) * 0.2)


def turn_of(tokens: int, d: int, first: int = 7, part: float = 1.0, base: float = 5e5, **settings) -> Turn:
    f = int(d / 2 * part)
    given = {"scaling": 1.0, "interleaved": False} | settings
    return Turn(torch.arange(first, first + tokens).int()[None], base ** (-torch.arange(f) / f), **given)


def far(packed: Packed, folder) -> Packed:
    """The same pages, with rows, pages and groups (three of each) so far apart that a place is beyond 32 bits but the
    distance of neighbours is not: in files that are nearly all hole."""
    strides = (2**30, 2**30 + 2**20, 2**30 + 2**22)
    moved = {}
    for name, tensor in packed.stored.items():
        assert tensor.shape[:3] == (3, 3, 3)
        rest = tensor[0, 0, 0].contiguous().stride()
        data = np.memmap(folder / name, np.uint8, "w+", shape=((2 * sum(strides) + 2**20) * tensor.itemsize,))
        view = torch.from_numpy(data).view(tensor.dtype).as_strided(tensor.shape, (*strides, *rest))
        moved[name] = view.copy_(tensor)
    return packed._replace(stored=moved)


def masked(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple:
    """(query, keys, basis, turn, values, visible) of three rows, with a mask [*shape, 96]."""
    keys, values = packed(("channel", 4), 4, 20, 3, 3, dtype), packed(("token", 4), 1, 40, 3, 3, dtype)
    visible = torch.rand(*shape, 96) > 0.5
    visible[-1, -1, -1] = False  # a row that sees nothing
    visible[..., 32:64] &= torch.rand(*shape, 1) > 0.5  # pages of which nothing is seen
    return torch.randn(3, 4, 2, 64) / 8, keys, basis_of(4, 20, 4, 64), turn_of(96, 64), values, visible


def placed(dtype: torch.dtype) -> tuple:
    """The same of two rows: pads in front of a row, a page that was cut, rows that differ, slots that are no token."""
    keys, values = packed(("channel", 4), 2, 20, 4, 2, dtype), packed(("token", 4), 1, 40, 4, 2, dtype)
    positions = torch.stack([torch.arange(128) - 17, torch.cat([torch.arange(40), torch.arange(35, 123)])]).int()
    turn = turn_of(128, 64)._replace(positions=positions.clamp_min(-1))
    visible = (positions >= 0)[:, None, None]
    return torch.randn(2, 2, 3, 64) / 8, keys, basis_of(2, 20, 2, 64), turn, values, visible
