"""Runs of channels of several widths, encoded. See reference.py."""

from torch import Tensor

from kvshrink.kernels.mixed import cpu, reference
from kvshrink.kernels.trellis import fits
from kvshrink.shapes import Float

__all__ = ["encode"]


def encode(
    pages: Float[Tensor, "b p G page r"],
    count: Float[Tensor, "b p"],
    sizes: tuple[int, ...],
    bits: tuple[int, ...],
    form: str,
) -> tuple[Tensor, Tensor]:
    """As the reference's, in C++ on a CPU that has a compiler. KVSHRINK_REFERENCE=1 leaves that out."""
    if sizes and pages.is_cpu and fits(pages.shape[3]):
        return cpu.encode(pages, count, sizes, bits, form)
    return reference.encode(pages, count, sizes, bits, form)
