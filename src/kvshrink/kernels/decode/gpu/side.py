"""One side's stored pages as the programs take them: where a record's parts lie, and the constants of a program.

Imports no triton, so that a machine without it can ask what fits.
"""

from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels import inputs
from kvshrink.kernels.latents import MIXED, Packed, level_table
from kvshrink.kernels.pack import packed_bytes
from kvshrink.kernels.records import Records
from kvshrink.shapes import Float, Int

PAGES = (16, 32, 64, 128)  # tokens of a page: planes of codes are whole tokens, and tiles what a product takes
WIDEST = 1024  # channels of value latents, whose weighted sum a program holds in registers

ALIGNED = 16  # bytes that a thread reads at once at most

Part = tuple[int, int]


class Side(NamedTuple):
    """Where the parts of a record begin, and how far apart those of its groups are, in bytes.

    Plain numbers, since they are the same for all pages of a cache: a program is compiled for those that are a multiple
    of 16 and those that are not.
    """

    data: Part  # latents, or bytes of codes
    scale: Part  # or gain; the data once more where the form has none
    low: Part
    places: Tensor  # where each channel's codes lie, of MIXED forms; else nothing, as of `levels`
    levels: Tensor  # what codes stand for, of MIXED forms and "table"


def fits(keys: Packed, values: Packed) -> bool:
    """Whether the programs can read these pages."""
    return keys.page == values.page and keys.page in PAGES and keys.width > 0 and 0 < values.width <= WIDEST


def side(packed: Packed, records: Records) -> Side:
    """How the records of some pages lie."""
    device = records.holder.device
    data = _part(records, _data(packed))
    numbers = [_part(records, name) for name in inputs.NUMBERS.get(packed.form, ())]
    scale, low = (*numbers, data, data)[:2]
    places = table = _nothing(device)
    if packed.form in MIXED:
        places, table = _places(packed.runs, packed.page, device), _levels(packed.form, device)
    elif packed.form == "table":
        assert packed.levels is not None
        table = packed.levels.to(device, torch.float32)
    return Side(data, scale, low, places, table)


def constants(packed: Packed, records: Records, name: str) -> dict[str, Any]:
    """What a program is built for, under the names of its arguments."""
    data, size = records.field(_data(packed)), records.layout.size
    # one run is addressed by arithmetic; bits 0: there may be several, and a table says where a channel lies
    bits = packed.runs[0][0] if packed.form in ("channel", "token", "table") else 0
    return {
        f"{name}_FORM": packed.form,
        f"{name}_BITS": bits,
        f"{name}_DATA": str(data.dtype).removeprefix("torch."),
        f"{name}_ALIGN": gcd(size, ALIGNED),  # of every record's address
        f"{name}_WIDTH": packed.width,
        f"{name}_GROUPS": data.shape[0] * records.lanes,
        f"{name}_LANES": records.lanes,
        f"{name}_SHARE": packed.group if packed.form in ("token", "table", *MIXED) else 1,
    }


def _data(packed: Packed) -> str:
    return "latent" if packed.form == "raw" else "codes"


def _part(records: Records, name: str) -> Part:
    field = records.field(name)
    return field.offset, field.nbytes // max(1, field.shape[0])


@cache
def _nothing(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@cache
def _places(runs: tuple[tuple[int, int], ...], page: int, device: torch.device) -> Int[Tensor, "4 r"]:
    """Of each channel: the first byte of its run, the run's channels, its index among them, and bits per code."""
    columns, at = [], 0
    for bits, channels in runs:
        columns += [(at, channels, index, bits) for index in range(channels)]
        at += packed_bytes(page * channels, bits)
    return torch.tensor(columns, dtype=torch.int32).T.contiguous().to(device)


@cache
def _levels(form: str, device: torch.device) -> Float[Tensor, "9 256"]:
    return level_table(form).to(device)
