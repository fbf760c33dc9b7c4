"""Trellis-coded quantisation of unit normal numbers. See reference.py."""

from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.trellis import cpu, reference
from kvshrink.kernels.trellis_levels import BITS, expected_error, from_codes, levels
from kvshrink.shapes import Float, UInt8

__all__ = ["BITS", "expected_error", "fits", "from_codes", "levels", "to_codes"]


def to_codes(x: Float[Tensor, "*outer page r"], bits: int) -> UInt8[Tensor, "*outer page r"]:
    """As the reference's, in C++ on a CPU that has a compiler."""
    search = cpu.to_codes if x.is_cpu and fits(x.shape[-2]) else reference.to_codes
    return search(x, bits)


def fits(page: int) -> bool:
    """Whether there is a C++ search for pages of so many tokens. KVSHRINK_REFERENCE=1 leaves it out."""
    return cpu.SHORTEST <= page <= cpu.LONGEST and not native.left_out() and native.library() is not None
