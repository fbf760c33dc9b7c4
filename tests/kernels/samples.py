"""Stored pages, bases and positions for the tests of decode kernels."""

import itertools
from dataclasses import replace

import numpy as np
import torch

from kvshrink.kernels.decode import Basis, Live, Turn
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.normal.reference import levels
from kvshrink.kernels.records import Holder, Records, recorded
from kvshrink.methods._packing import Affine, Codebook, Raw
from kvshrink.methods._packing.mixed import Mixed

FORMS = [
    "raw",
    *itertools.product(("channel", "token"), (1, 2, 3, 4, 8)),
    *itertools.product(("table",), (1, 2, 3, 4)),
    "normal",
    "trellis",
    "trellis up to 4",
]
MIXED = {"normal": "normal", "trellis": "trellis", "trellis up to 4": "trellis"}
PAGE = 32


def packed(
    form, groups: int, width: int, pages: int, b: int, dtype: torch.dtype, group: int = 64, page: int = PAGE
) -> Packed:
    """Random latents in this form, between pages of nothing but ones: NaN, and the highest codes."""
    rows = torch.randn(b, groups, (pages + 2) * page, width) + 0.3
    if form in MIXED:
        sizes = (16,) * (width // 16) + ((width % 16,) if width % 16 else ())
        widths = [4, 3, 2, 1] if form == "trellis up to 4" else [8, 4, 3, 2, 1]
        bits = sorted((widths * len(sizes))[: len(sizes)], reverse=True)
        packing = Mixed(sizes, tuple(bits), page, form=MIXED[form])
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


class Strewn(Holder):
    """Records [m, size] in any order. index: int64 [b, L, p], which one each page is; -1 where a lane lacks it."""

    def __init__(self, run: torch.Tensor, index: np.ndarray) -> None:
        self.run, self.index = run, index

    @property
    def device(self) -> torch.device:
        return self.run.device

    def bytes_of(self, start: int, stop: int) -> torch.Tensor:
        index = self.index[:, :, start:stop]
        return self.run[torch.from_numpy(np.where(index < 0, self.index.max(), index)).to(self.device)]

    def addresses(self, start: int, stop: int) -> np.ndarray:
        index = self.index[:, :, start:stop]
        return np.ascontiguousarray(np.where(index < 0, 0, self.run.data_ptr() + self.run.stride(0) * index))

    def device_addresses(self, start: int, stop: int) -> torch.Tensor:
        """As a cache has them: a part of the whole table, which need not be aligned."""
        return torch.from_numpy(self.addresses(0, self.index.shape[2])).to(self.device)[:, :, start:stop].contiguous()

    def to(self, device: torch.device) -> "Strewn":
        return Strewn(self.run.to(device), self.index)


def strewn(keys: Packed, values: Packed, lanes: int, gone: torch.Tensor | None = None) -> tuple[Packed, Packed]:
    """The same pages, keys and values in one record for each of so many lanes, in no order, among records of ones.

    gone: pages [b, lanes, p] that a lane does not have.
    """
    sides = {"keys.": keys, "values.": values}
    given = recorded({at + name: t for at, side in sides.items() for name, t in side.stored.items()}, lanes)
    *outer, size = given.bytes.shape
    index = torch.randperm(given.bytes.shape[:3].numel() + 2)[:-2].view(outer)
    run = torch.full((index.numel() + 2, size), 255, dtype=torch.uint8)
    run[index] = given.bytes
    if gone is not None:
        run[index[gone]] = 255
        index[gone] = -1
    records = Records(Strewn(run, index.numpy()), given.layout, 0, given.pages)
    k, v = (side._replace(stored=records.under(at)) for at, side in sides.items())
    return k, v


def far(packed: Packed, folder) -> Packed:
    """The same pages, so far apart that places are beyond 32 bits but the distance of neighbours is not: in a file that
    is nearly all hole."""
    records, step = packed.stored.bytes, 2**30 + 2**20
    index, size = np.arange(records.shape[:3].numel()).reshape(records.shape[:3]), records.shape[3]
    data = torch.from_numpy(np.memmap(folder / "far", np.uint8, "w+", shape=(index.size * step,)))
    run = data.as_strided((index.size, size), (step, 1)).copy_(records.reshape(-1, size))
    return packed._replace(stored=Records(Strewn(run, index), packed.stored.layout, 0, packed.stored.pages))


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


def ragged(form, lanes: int, dtype: torch.dtype) -> tuple[tuple, Live]:
    """The same of two rows and four heads, whose lanes lack pages in front, between, behind, or all of them; and which
    slots of the others are to be read."""
    keys, values = packed(form, 4, 20, 5, 2, dtype, 8), packed(form, max(2, lanes), 24, 5, 2, dtype, 24)
    gone = torch.zeros(2, lanes, 5, dtype=torch.bool)
    gone[0, -1, 3:], gone[1, 0, 1], gone[1, -1, 0] = True, True, True
    counts = torch.randint(0, PAGE + 1, gone.shape, dtype=torch.uint8)
    counts[:, 0, 0], counts[..., 2] = 0, PAGE
    if lanes > 2:
        gone[1, 1], counts[0, 1] = True, 0
    keys, values = strewn(keys, values, lanes, gone)
    visible = torch.rand(2, 1, 3, 160) > 0.3
    job = torch.randn(2, 4, 3, 32) / 6, keys, basis_of(4, 20, 4, 32), turn_of(160, 32), values, visible
    return job, Live(counts, torch.tensor([85, 3]).int())
