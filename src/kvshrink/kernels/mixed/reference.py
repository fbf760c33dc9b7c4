"""Pages of numbers as runs of channels of several widths: a gain per page and group of channels, and codes."""

import torch
from torch import Tensor

from kvshrink.kernels.groups import reach, runs_of, widened
from kvshrink.kernels.latents import code_of
from kvshrink.kernels.pack import pack
from kvshrink.shapes import Float


def encode(
    pages: Float[Tensor, "b p G page r"],
    count: Float[Tensor, "b p"],
    sizes: tuple[int, ...],
    bits: tuple[int, ...],
    form: str,
) -> tuple[Tensor, Tensor]:
    """(codes uint8 [b, p, G, bytes], gains float16 [b, p, G, groups]).

    count: tokens of each page that are real; the others are 0. sizes, bits: channels of each group, alike but for a
    smaller last one, and their width. form: what codes of up to 4 bits are, as kernels/latents names it.
    """
    energy = pages.square().sum(3) / count[:, :, None, None]  # [b, p, G, r]
    gain = torch.stack([part.mean(-1) for part in energy.split(sizes, -1)], -1) if sizes else energy
    found = gain.new_tensor([reach(form, width) for width in bits]).view(-1, 2)
    gain = widened(pages, gain.sqrt(), (found[:, 0], found[:, 1]), sizes).to(torch.float16)
    spread = gain.float().repeat_interleave(torch.tensor(sizes, device=gain.device, dtype=torch.long), -1)[
        :, :, :, None
    ]
    unit = pages / torch.where(spread > 0, spread, torch.ones_like(spread))
    codes = [
        pack(code_of(form, width).to_codes(unit[..., part], width).flatten(3), width)
        for width, part in runs_of(sizes, bits)
    ]
    return (torch.cat(codes, -1) if codes else pages.new_zeros(*pages.shape[:3], 0).byte()), gain
