"""Stored pages -> float32 latents: the one place that says what each stored form means.

form       stored tensors, p pages of `page` tokens, G groups of `width` channels
"raw"      latent [b, p, G, page, width], as floats
"channel"  codes [b, p, G, bytes]; scale and low [b, p, G, width]: one per channel and page
"token"    codes [b, p, G, bytes]; scale and low [b, p, G, page, ceil(width / group)]: per token and `group` channels
"table"    codes [b, p, G, bytes]; scale [b, p, G, page, ceil(width / group)]: a code is one of `levels`, times scale
"normal"   codes [b, p, G, bytes]: runs of channels of one width, one after the other, as Lloyd-Max codes of a unit
           normal; gain [b, p, G, ceil(width / group)]
A run of c channels at w bits is page * c codes, tokens outermost, packed as kernels/pack says. scale, low and gain are
float16.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels.affine import dequantize
from kvshrink.kernels.normal import from_codes
from kvshrink.kernels.pack import packed_bytes, unpack
from kvshrink.shapes import Float


class Packed(NamedTuple):
    """Some pages of one side. runs: (bits, channels) of neighbouring channels of one width; none for "raw"."""

    form: Literal["raw", "channel", "token", "table", "normal"]
    stored: Mapping[str, Tensor]
    width: int
    page: int
    runs: tuple[tuple[int, int], ...] = ()
    group: int = 0  # channels that share a "token" or "table" scale or a "normal" gain; the last group may be smaller
    levels: Tensor | None = None  # of "table": what each code stands for, float32


def load(packed: Packed) -> Float[Tensor, "b G t r"]:
    """Latents of all tokens of the pages, float32."""
    stored = packed.stored
    if packed.form == "raw":
        pages = stored["latent"].float()
    elif packed.form == "normal":
        spread = _spread(packed, "gain")[..., None, :]
        unit = [from_codes(codes, bits) for bits, codes in _runs(packed)]
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
