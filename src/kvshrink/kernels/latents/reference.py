"""Stored pages -> float32 latents: the one place that says what each stored form means.

form       stored tensors, p pages of `page` tokens, G groups of `width` channels
"raw"      latent [b, p, G, page, width], as floats
"channel"  codes [b, p, G, bytes]; scale and low [b, p, G, width]: one per channel and page
"token"    codes [b, p, G, bytes]; scale and low [b, p, G, page, ceil(width / group)]: per token and `group` channels
"table"    codes [b, p, G, bytes]; scale [b, p, G, page, ceil(width / group)]: a code is one of `levels`, times scale
"normal"   codes [b, p, G, bytes]: runs of channels of one width, one after the other, as Lloyd-Max codes of a unit
           normal; gain [b, p, G, ceil(width / group)]
"trellis"  as "normal", but runs of up to 4 bits are trellis codes (kernels/trellis)
A run of c channels at w bits is page * c codes, tokens outermost, packed as kernels/pack says. scale, low and gain are
float16.
"""

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels import normal, trellis
from kvshrink.kernels.affine import dequantize
from kvshrink.kernels.pack import packed_bytes, unpack
from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.shapes import Float

MIXED = ("normal", "trellis")  # forms whose runs have bits of their own, and a gain


class Packed(NamedTuple):
    """Some pages of one side. runs: (bits, channels) of neighbouring channels of one width; none for "raw"."""

    form: Literal["raw", "channel", "token", "table", "normal", "trellis"]
    stored: Mapping[str, Tensor]
    width: int
    page: int
    runs: tuple[tuple[int, int], ...] = ()
    group: int = 0  # channels that share a "token" or "table" scale or a MIXED gain; the last group may be smaller
    levels: Tensor | None = None  # of "table": what each code stands for, float32


def load(packed: Packed) -> Float[Tensor, "b G t r"]:
    """Latents of all tokens of the pages, float32."""
    stored = packed.stored
    if packed.form == "raw":
        pages = stored["latent"].float()
    elif packed.form in MIXED:
        spread = _spread(packed, "gain")[..., None, :]
        unit = [code_of(packed.form, bits).from_codes(codes, bits) for bits, codes in _runs(packed)]
        pages = torch.cat(unit, -1) * spread if unit else spread.expand(*spread.shape[:3], packed.page, 0)
    else:
        codes = torch.cat([c for _, c in _runs(packed)], -1)
        if packed.form == "table":
            assert packed.levels is not None
            pages = packed.levels.to(codes.device)[codes.int()] * _spread(packed, "scale")
        elif packed.form == "channel":
            pages = dequantize(codes, stored["scale"][..., None, :], stored["low"][..., None, :])
        else:
            pages = dequantize(codes, _spread(packed, "scale"), _spread(packed, "low"))
    return pages.transpose(1, 2).flatten(2, 3)


def code_of(form: str, bits: int) -> ModuleType:
    """What codes of a run of these bits are, in a form of MIXED."""
    return trellis if form == "trellis" and bits in trellis.BITS else normal


@cache
def level_table(form: str) -> Float[Tensor, "9 256"]:
    """The numbers that codes, or a trellis' levels, of so many bits stand for, in a form of MIXED."""
    table = torch.zeros(9, 256)
    for bits in WIDTHS:
        found = code_of(form, bits).levels(bits)
        table[bits, : len(found)] = found
    return table


def _runs(packed: Packed) -> list[tuple[int, Tensor]]:
    """(bits, codes [b, p, G, page, channels]) of each run."""
    at, found = 0, []
    for bits, channels in packed.runs:
        size = packed_bytes(packed.page * channels, bits)
        run = unpack(packed.stored["codes"][..., at : at + size], bits)
        found.append((bits, run.unflatten(-1, (packed.page, channels))))
        at += size
    return found


def _spread(packed: Packed, name: str) -> Tensor:
    """A number per group of channels, as one per channel, float32."""
    return packed.stored[name].float().repeat_interleave(packed.group, -1)[..., : packed.width]
