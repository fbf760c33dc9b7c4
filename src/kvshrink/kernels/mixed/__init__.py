"""Runs of channels of several widths, encoded. See reference.py."""

import os

from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.mixed import cpu, reference
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
    plain = os.environ.get("KVSHRINK_REFERENCE") == "1" or not pages.is_cpu or pages.shape[3] > cpu.LONGEST
    if plain or not sizes or native.library() is None:
        return reference.encode(pages, count, sizes, bits, form)
    return cpu.encode(pages, count, sizes, bits, form)
