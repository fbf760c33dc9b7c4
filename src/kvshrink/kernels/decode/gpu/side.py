"""One side's stored pages as the programs take them: pointers, strides and the constants that a program is built for.

Imports no triton, so that a machine without it can ask what fits.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels import inputs
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.normal.reference import levels
from kvshrink.kernels.pack.reference import WIDTHS, packed_bytes
from kvshrink.shapes import Float, Int

PAGES = (16, 32, 64, 128)  # tokens of a page: planes of codes are whole tokens, and tiles what a product takes
WIDEST = 1024  # channels of value latents, whose weighted sum a program holds in registers

Strides = tuple[int, int, int]


class Side(NamedTuple):
    """Tensors whose last axes are contiguous, each with its strides of row, page and group, in elements."""

    data: Tensor  # latents, or bytes of codes
    data_at: Strides
    scale: Tensor  # or gain; the data once more where the form has none
    scale_at: Strides
    low: Tensor
    low_at: Strides
    places: Tensor  # where each channel's codes lie, of "normal"
    levels: Tensor  # what codes stand for, of "normal" and "table"


def fits(keys: Packed, values: Packed) -> bool:
    """Whether the programs can read these pages."""
    return keys.page == values.page and keys.page in PAGES and keys.width > 0 and 0 < values.width <= WIDEST


def side(packed: Packed) -> Side:
    """The tensors of some pages; copied only where their last axes are not contiguous."""
    data = inputs.whole(packed.stored["latent" if packed.form == "raw" else "codes"])
    numbers = [inputs.whole(packed.stored[name]) for name in inputs.NUMBERS.get(packed.form, ())]
    scale, low = (*numbers, data, data)[:2]
    places, table = data, data
    if packed.form == "normal":
        places, table = _places(packed.runs, packed.page, data.device), _levels(data.device)
    elif packed.form == "table":
        assert packed.levels is not None
        table = packed.levels.to(data.device, torch.float32)
    return Side(data, _strides(data), scale, _strides(scale), low, _strides(low), places, table)


def constants(packed: Packed, name: str) -> dict[str, Any]:
    """What a program is built for, under the names of its arguments."""
    groups = next(iter(packed.stored.values())).shape[2]
    # one run is addressed by arithmetic; bits 0: there may be several, and a table says where a channel lies
    bits = packed.runs[0][0] if packed.form in ("channel", "token", "table") else 0
    return {
        f"{name}_FORM": packed.form,
        f"{name}_BITS": bits,
        f"{name}_WIDTH": packed.width,
        f"{name}_GROUPS": groups,
        f"{name}_SHARE": packed.group if packed.form in ("token", "table", "normal") else 1,
    }


def _strides(tensor: Tensor) -> Strides:
    row, page, group = tensor.stride()[:3]
    return row, page, group


@cache
def _places(runs: tuple[tuple[int, int], ...], page: int, device: torch.device) -> Int[Tensor, "4 r"]:
    """Of each channel: the first byte of its run, the run's channels, its index among them, and bits per code."""
    columns, at = [], 0
    for bits, channels in runs:
        columns += [(at, channels, index, bits) for index in range(channels)]
        at += packed_bytes(page * channels, bits)
    return torch.tensor(columns, dtype=torch.int32).T.contiguous().to(device)


@cache
def _levels(device: torch.device) -> Float[Tensor, "9 256"]:
    """The level of each code of so many bits."""
    table = torch.zeros(9, 256)
    for bits in WIDTHS:
        table[bits, : 2**bits] = levels(bits)
    return table.to(device)
