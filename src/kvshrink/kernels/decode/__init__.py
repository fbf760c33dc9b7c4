"""Decode attention over stored pages in one operation. See reference.py for what it means."""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from kvshrink.kernels import native
from kvshrink.kernels.decode import cpu
from kvshrink.kernels.decode.gpu.side import fits
from kvshrink.kernels.decode.reference import Basis, Turn, decode
from kvshrink.kernels.latents import Packed

MOST_ROWS = 64  # of a KV head: query heads times new tokens; with more of them large products win
log = logging.getLogger("kvshrink")

__all__ = ["MOST_ROWS", "Basis", "Turn", "decode", "fused"]


def fused(device: torch.device, keys: Packed, values: Packed) -> Callable | None:
    """The kernel that does `decode` without holding more than a tile, on this device; None if there is none.

    KVSHRINK_REFERENCE=1 in the environment leaves all of them out.
    """
    if os.environ.get("KVSHRINK_REFERENCE") == "1":
        return None
    if device.type == "cpu":
        read = keys.page == values.page == cpu.PAGE and all(
            _known(side) and _whole_runs(side) for side in (keys, values)
        )
        return cpu.decode if read and native.library() is not None else None
    if device.type == "cuda" and fits(keys, values) and all(map(_known, (keys, values))) and _has_triton():
        from kvshrink.kernels.decode import triton

        return triton.decode
    return None


def _known(packed: Packed) -> bool:
    """Whether kernels read its floats, if it has any: not float64."""
    return packed.form != "raw" or packed.stored["latent"].dtype in cpu.RAW


def _whole_runs(packed: Packed) -> bool:
    """Whether channels of two widths never share a vector of 16."""
    return all(channels % 16 == 0 for _, channels in packed.runs[:-1])


@cache
def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    log.warning("no triton: decoding runs in plain torch, several times slower. Install kvshrink[gpu].")
    return False
