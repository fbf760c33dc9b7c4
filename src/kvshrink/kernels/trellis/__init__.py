"""Trellis-coded quantisation of unit normal numbers. See reference.py."""

from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.trellis import cpu, reference
from kvshrink.kernels.trellis_levels import BITS, expected_error, from_codes, levels
from kvshrink.shapes import Float, UInt8

__all__ = ["BITS", "expected_error", "from_codes", "levels", "to_codes"]


def to_codes(x: Float[Tensor, "*outer page r"], bits: int) -> UInt8[Tensor, "*outer page r"]:
    """As the reference's, in C++ on a CPU that has a compiler."""
    if x.is_cpu and x.shape[-2] <= cpu.LONGEST and native.library() is not None:
        return cpu.to_codes(x, bits)
    return reference.to_codes(x, bits)
