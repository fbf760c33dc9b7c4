"""The code of the nearest of some sorted levels: the lower one of two that are as near, the last one of no number."""

import torch
from torch import Tensor

from kvshrink.shapes import Float, UInt8


def nearest(x: Float[Tensor, "*rows k"], levels: Float[Tensor, " levels"]) -> UInt8[Tensor, "*rows k"]:
    borders = ((levels[1:] + levels[:-1]) / 2).to(x.device)
    found: Tensor = torch.bucketize(x.contiguous(), borders).to(torch.uint8)
    return found
