"""Decode attention over stored pages in one operation. See reference.py for what it means."""

import os
from collections.abc import Callable

import torch

from kvshrink.kernels import native
from kvshrink.kernels.decode.reference import Basis, Turn, decode
from kvshrink.kernels.latents import Packed

__all__ = ["Basis", "Turn", "decode", "fused"]


def fused(device: torch.device, keys: Packed, values: Packed) -> Callable | None:
    """The kernel that does `decode` without holding more than a tile, on this device; None if there is none.

    KVSHRINK_REFERENCE=1 in the environment leaves all of them out.
    """
    if os.environ.get("KVSHRINK_REFERENCE") == "1":
        return None
    if device.type == "cpu":
        from kvshrink.kernels.decode import cpu

        fits = keys.page == values.page == cpu.PAGE
        return cpu.decode if fits and native.library() is not None else None
    return None
