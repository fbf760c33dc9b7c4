"""VidKV: 1.5-bit keys and 1.58-bit values for the tokens of videos. arXiv 2503.16257

Keys per channel: the half of a head's channels with the widest range in a page gets 2 bits; the others are Fourier
transformed along the channels and keep a sign each, times the channel's mean magnitude. Values per channel are -1, 0 or
1 times the channel's mean magnitude, 0 below half of it; five of them lie in a byte. With the scales that is 2.28 and
2.1 bits at pages of 32 tokens, not 1.5 and 1.58.

Departures: channels are chosen in each page, not once for the prompt; the transform is the real, orthonormal one, as
many numbers out as in (the official code keeps both parts of a complex one, twice the numbers); signs decode to -s and
s (there: 0 and s), threes to -s, 0, s (there the scale is lost and a code takes 2 bits); nothing is quantised twice; 4
exact sinks; no choice of visual tokens by text.
"""

from dataclasses import dataclass
from functools import cache
from math import pi
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._packing import Affine, Codebook, Packing
from kvshrink.methods._packing.by_channel import ByChannel, Rotated
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV
from kvshrink.shapes import Float


@final
@dataclass(frozen=True)
class VidKV(Quantiser):
    """wide: share of a head's key channels that gets 2 bits; the others get 1, values 1.6."""

    window: int = 128
    wide: float = 0.5

    def check(self) -> None:
        super().check()
        require(0 < self.wide < 1, f"wide={self.wide}", "Use a share between 0 and 1.")

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        groups, width, page = space.groups, space.width, space.page
        if kv == "value":
            return Codebook(groups, width, page, torch.tensor([-1.0, 0.0, 1.0]), "channel", scale="mean")
        wide = min(max(1, round(self.wide * width)), width - 1)
        if width < 2:
            return Affine(groups, width, page, 2, "channel")
        signs = Codebook(groups, width - wide, page, torch.tensor([-1.0, 1.0]), "channel", scale="mean")
        return ByChannel(Affine(groups, wide, page, 2, "channel"), Rotated(signs, fourier(width - wide)), "range")


@cache
def fourier(size: int) -> Float[Tensor, "size size"]:
    """The real discrete Fourier transform as an orthogonal matrix: cosines and sines of each frequency as columns."""
    at = torch.arange(size, dtype=torch.float64)
    columns = [torch.full((size,), size**-0.5, dtype=torch.float64)]
    for k in range(1, (size - 1) // 2 + 1):
        angle = 2 * pi * k * at / size
        columns += [angle.cos() * (2 / size) ** 0.5, angle.sin() * (2 / size) ** 0.5]
    if size % 2 == 0:
        columns.append((pi * at).cos() * size**-0.5)
    return torch.stack(columns, 1).float()


METHOD = VidKV
