"""Recent tokens as a window holds them, and attention to them. See reference.py."""

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.held import cpu, reference
from kvshrink.kernels.held.reference import SCALE, Placed
from kvshrink.kernels.native import left_out
from kvshrink.shapes import Float, UInt8

__all__ = ["SCALE", "Placed", "attend", "rounded", "unrounded"]


def rounded(rows: Float[Tensor, "b h w d"]) -> UInt8[Tensor, "b h w n"]:
    """As the reference's, in C++ on a CPU that has a compiler."""
    return cpu.rounded(rows) if _native(rows) else reference.rounded(rows)


def unrounded(stored: UInt8[Tensor, "b h w n"], dtype: torch.dtype) -> Float[Tensor, "b h w d"]:
    """As the reference's, in C++ on a CPU that has a compiler."""
    fits = _native(stored) and dtype in cpu.FORMS
    return cpu.unrounded(stored, dtype) if fits else reference.unrounded(stored, dtype)


def attend(
    query: Float[Tensor, "b h x d"],
    keys: Tensor | Placed,
    values: Tensor | Placed,
    sinks: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b h x e"], Float[Tensor, "b h x 1"]] | None:
    """As the reference's, in C++ on a CPU that has a compiler; else None: a block at a time takes less memory."""
    if not _native(query) or dtype not in cpu.FORMS or (torch.is_grad_enabled() and query.requires_grad):
        return None
    return cpu.attend(query, keys, values, sinks, softcap, dtype)


def _native(tensor: Tensor) -> bool:
    return tensor.is_cpu and not left_out() and native.library() is not None
