"""What keys get of the attention of many queries. See reference.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.decode import has_triton
from kvshrink.kernels.held.cpu import FORMS
from kvshrink.kernels.mass import cpu, reference
from kvshrink.kernels.native import left_out
from kvshrink.shapes import Bool, Float, Int

__all__ = ["mass"]

WIDEST = 256  # channels that a Triton program keeps of its tiles


def mass(
    queries: Float[Tensor, "b h m x d"],
    keys: Float[Tensor, "b h t d"],
    ends: Int[Tensor, " x"],
    weights: Float[Tensor, " x"] | None = None,
    real: Bool[Tensor, "b t"] | None = None,
    asks: Bool[Tensor, "b x"] | None = None,
    most: bool = False,
) -> Float[Tensor, "b h t"]:
    """As the reference's: in C++ on a CPU that has a compiler, in Triton on a CUDA device. KVSHRINK_REFERENCE=1 leaves
    both out."""
    with torch.no_grad():
        return _chosen(keys)(queries, keys, ends, weights, real, asks, most)


def _chosen(keys: Tensor) -> Callable[..., Tensor]:
    if left_out() or keys.dtype not in FORMS:
        return reference.mass
    if keys.is_cuda and has_triton() and keys.shape[3] <= WIDEST:
        from kvshrink.kernels.mass import triton

        return triton.mass
    return cpu.mass if keys.is_cpu and native.library() is not None else reference.mass
