"""The numbers of stored pages, in C++ where that can be. What they are: kernels/latents/reference.py."""

from torch import Tensor

from kvshrink.kernels.latents import Packed, reference
from kvshrink.kernels.load import cpu
from kvshrink.shapes import Float

__all__ = ["load"]


def load(packed: Packed) -> Float[Tensor, "b G t r"]:
    """Latents of all tokens of the pages, float32. KVSHRINK_REFERENCE=1 leaves C++ out."""
    return cpu.load(packed) if cpu.fits(packed) else reference.load(packed)
