"""The encoder of `reference.py` in C++ (native/mixed.cpp), for pages on a CPU of at most LONGEST tokens."""

import ctypes
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.groups import reach
from kvshrink.kernels.latents import level_table
from kvshrink.kernels.pack import packed_bytes
from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.kernels.trellis.cpu import LONGEST
from kvshrink.shapes import Float

__all__ = ["LONGEST", "encode"]


class _Store(Structure):
    _fields_ = (
        ("pages", c_int64),
        *((name, c_int32) for name in ("page", "width", "groups", "group", "trellis", "threads")),
        *((name, c_void_p) for name in ("bits", "levels", "errors", "x", "count", "codes", "gains")),
    )


def encode(
    pages: Float[Tensor, "b p G page r"],
    count: Float[Tensor, "b p"],
    sizes: tuple[int, ...],
    bits: tuple[int, ...],
    form: str,
) -> tuple[Tensor, Tensor]:
    """As the reference, up to codes of equal cost and the order of sums; needs native.library()."""
    library = native.library()
    assert library is not None
    assert pages.is_cpu
    b, p, bases, page, width = pages.shape
    assert page <= LONGEST
    x, counts = pages.float().contiguous(), count.float()[..., None].expand(b, p, bases).contiguous()
    size = sum(packed_bytes(page * n, w) for n, w in zip(sizes, bits, strict=True))
    codes = torch.empty(b, p, bases, size, dtype=torch.uint8, device="cpu")
    gains = torch.empty(b, p, bases, len(sizes), dtype=torch.float16, device="cpu")
    levels, errors, widths = level_table(form), _errors(form), _array(bits)
    store = _Store(b * p * bases, page, width, len(sizes), sizes[0], form == "trellis", torch.get_num_threads())
    store.bits = ctypes.addressof(widths)
    for name, tensor in {
        "levels": levels,
        "errors": errors,
        "x": x,
        "count": counts,
        "codes": codes,
        "gains": gains,
    }.items():
        setattr(store, name, tensor.data_ptr())
    if library.kvshrink_mixed(byref(store)):
        raise MemoryError("encoding: not enough memory")
    return codes, gains


@cache
def _array(bits: tuple[int, ...]) -> Any:
    return (c_int32 * len(bits))(*bits)


@cache
def _errors(form: str) -> Tensor:
    return torch.tensor([reach(form, bits)[1] if bits in WIDTHS else 0.0 for bits in range(9)], device="cpu")
