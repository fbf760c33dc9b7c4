"""What `reference.py` does, in C++ (native/nearest.cpp), to the code, for float32 on a CPU."""

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.shapes import Float, UInt8


def nearest(x: Float[Tensor, "*rows k"], levels: Float[Tensor, " levels"]) -> UInt8[Tensor, "*rows k"]:
    """As the reference, of float32 on a CPU; needs native.library()."""
    library = native.library()
    assert library is not None
    x, borders = x.contiguous(), ((levels[1:] + levels[:-1]) / 2).cpu().contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    where = [c_void_p(t.data_ptr()) for t in (x, borders, out)]
    threads = c_int32(torch.get_num_threads())
    library.kvshrink_nearest(where[0], c_int64(x.numel()), where[1], c_int32(len(borders)), threads, where[2])
    return out
