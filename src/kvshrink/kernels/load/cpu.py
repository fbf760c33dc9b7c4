"""What `kernels/latents/reference.py` calls `load`, in C++ (native/load.cpp), to the bit."""

from ctypes import byref, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from kvshrink.kernels import inputs, native
from kvshrink.kernels.jobs import PAGE, side_of
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.records import Records
from kvshrink.shapes import Float


def fits(packed: Packed) -> bool:
    """Whether there is a library for these pages."""
    if packed.form == "raw" or packed.page != PAGE or not packed.width or native.left_out():
        return False
    stored, numbers = packed.stored, inputs.NUMBERS[packed.form]
    if isinstance(stored, Records):
        where, kinds = stored.holder.device, {stored.field(name).dtype for name in numbers}
    else:  # those of a fit may be wider, or learnt
        where, kinds = stored["codes"].device, {stored[name].dtype for name in numbers}
        if any(stored[name].requires_grad for name in numbers):
            return False
    return where.type == "cpu" and kinds == {torch.float16} and native.library() is not None


def load(packed: Packed) -> Float[Tensor, "b G t r"]:
    """As the reference, for pages of PAGE tokens on a CPU."""
    library = native.library()
    assert library is not None
    records, held = inputs.records(packed), list[Any]()
    inputs.check_pages(packed, records)
    b, _, pages = records.addresses.shape
    side = side_of(packed._replace(stored=records), held)
    out = torch.empty(b, side.groups, pages * PAGE, packed.width, dtype=torch.float32, device="cpu")
    threads = c_int32(torch.get_num_threads() if out.numel() > 2**20 else 1)
    if out.numel() and library.kvshrink_load(
        byref(side), c_int32(b), c_int32(pages), threads, c_void_p(out.data_ptr())
    ):
        raise MemoryError("stored pages: not enough memory")
    return out
