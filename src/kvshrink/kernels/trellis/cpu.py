"""The search of `reference.py` in C++ (native/trellis.cpp)."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.trellis_levels import levels
from kvshrink.shapes import Float, UInt8

SHORTEST, LONGEST = 8, 32  # tokens of a page: a path's coded bits are one word, and its costs are clipped


def to_codes(x: Float[Tensor, "*outer page r"], bits: int) -> UInt8[Tensor, "*outer page r"]:
    """As the reference, to within a hundredth of a path's error; needs native.library()."""
    library = native.library()
    assert library is not None
    assert x.is_cpu
    page, channels = x.shape[-2:]
    assert page <= LONGEST
    rows = x.float().contiguous()
    codes = torch.empty(rows.shape, dtype=torch.uint8, device="cpu")
    table = levels(bits).float()
    blocks = rows.numel() // max(1, page * channels)
    library.kvshrink_trellis(
        c_void_p(rows.data_ptr()),
        c_int64(blocks),
        c_int(page),
        c_int(channels),
        c_void_p(table.data_ptr()),
        c_int(len(table)),
        c_int(torch.get_num_threads()),
        c_void_p(codes.data_ptr()),
    )
    return codes
