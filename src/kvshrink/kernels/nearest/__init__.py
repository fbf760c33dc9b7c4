"""The nearest of a few levels. See reference.py."""

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.nearest import cpu, reference
from kvshrink.shapes import Float, UInt8

__all__ = ["nearest"]
MOST = 16  # levels: with more of them a search is faster than going through all


def nearest(x: Float[Tensor, "*rows k"], levels: Float[Tensor, " levels"]) -> UInt8[Tensor, "*rows k"]:
    """As the reference, in C++ on a CPU that has a compiler. KVSHRINK_REFERENCE=1 leaves that out."""
    alike = x.dtype == levels.dtype == torch.float32 and x.is_cpu and len(levels) <= MOST
    native_too = alike and not native.left_out() and native.library() is not None
    found: Tensor = (cpu if native_too else reference).nearest(x, levels)
    return found
