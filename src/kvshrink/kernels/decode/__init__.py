"""Decode attention over stored pages in one operation. See reference.py for what it means."""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from kvshrink.kernels import native
from kvshrink.kernels.decode import cpu
from kvshrink.kernels.decode.gpu.side import fits
from kvshrink.kernels.decode.reference import ALL, Basis, Constant, Live, Turn, decode
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.native import left_out
from kvshrink.kernels.records import Records

MOST_ROWS = 64  # of a KV head: query heads times new tokens; with more of them large products win
log = logging.getLogger("kvshrink")

__all__ = ["ALL", "MOST_ROWS", "Basis", "Choice", "Constant", "Live", "Turn", "decode", "fused", "left_out"]


class Choice(NamedTuple):
    """The kernel that does `decode` without holding more than a tile; or, in words, why there is none."""

    kernel: Callable[..., Any] | None
    why: str = ""

    def __str__(self) -> str:
        return f"no: {self.why}" if self.kernel is None else "yes"


def fused(device: torch.device, keys: Packed | None, values: Packed | None) -> Choice:
    """The kernel for pages of these forms on this device. None: a form that `kernels/latents` does not know.

    Without any in `left_out`.
    """
    if left_out():
        return Choice(None, "KVSHRINK_REFERENCE=1")
    if keys is None or values is None:
        return Choice(None, f"no kernel reads this form of {'keys' if keys is None else 'values'}")
    if keys.page != values.page:
        return Choice(None, f"pages of {keys.page} and {values.page} tokens")
    if not all(map(_known, (keys, values))):
        return Choice(None, "float64")
    return _on_cpu(keys, values) if device.type == "cpu" else _on_gpu(device, keys, values)


def _on_cpu(keys: Packed, values: Packed) -> Choice:
    if keys.page != cpu.PAGE:
        return Choice(None, f"pages of {keys.page} tokens; C++ reads {cpu.PAGE}")
    if not all(map(_whole_runs, (keys, values))):
        return Choice(None, "runs of channels that share a vector of 16")
    if native.library() is None:
        return Choice(None, "no C++ compiler")
    return Choice(cpu.decode)


def _on_gpu(device: torch.device, keys: Packed, values: Packed) -> Choice:
    if device.type != "cuda":
        return Choice(None, f"none for {device.type}")
    if not fits(keys, values):
        return Choice(None, f"pages of {keys.page} tokens, latents of {keys.width} and {values.width} channels")
    if not has_triton():
        return Choice(None, "no triton")
    from kvshrink.kernels.decode import triton

    return Choice(triton.decode)


def _known(packed: Packed) -> bool:
    """Whether kernels read its floats, if it has any: not float64."""
    if packed.form != "raw":
        return True
    stored = packed.stored
    return (stored.field("latent") if isinstance(stored, Records) else stored["latent"]).dtype in cpu.RAW


def _whole_runs(packed: Packed) -> bool:
    """Whether channels of two widths never share a vector of 16."""
    return all(channels % 16 == 0 for _, channels in packed.runs[:-1])


@cache
def has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    log.warning("no triton: decoding runs in plain torch, several times slower. Install kvshrink[gpu].")
    return False
