"""What `reference.py` does, with each tile of scores read once in C++ (native/mass.cpp); needs native.library()."""

from ctypes import Structure, byref, c_int32, c_void_p

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.held.cpu import FORMS
from kvshrink.kernels.score_tiles import gather, scored
from kvshrink.shapes import Bool, Float, Int

TILE = 2**21  # scores alive at a time: of 16 bits they stay in a core's share of the last cache


class _Job(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("batch", "heads", "group", "x", "t", "form", "most", "threads")),
        *((name, c_void_p) for name in ("scores", "ends", "weights", "real", "asks", "out")),
    )


def mass(
    queries: Float[Tensor, "b h m x d"],
    keys: Float[Tensor, "b h t d"],
    ends: Int[Tensor, " x"],
    weights: Float[Tensor, " x"] | None = None,
    real: Bool[Tensor, "b t"] | None = None,
    asks: Bool[Tensor, "b x"] | None = None,
    most: bool = False,
) -> Float[Tensor, "b h t"]:
    """As the reference, up to the order of sums."""
    library = native.library()
    assert library is not None
    out = torch.zeros(keys.shape[:3], dtype=torch.float32, device="cpu")
    for heads, at, end, scores in scored(queries, keys, ends, TILE):
        b, h, m, x, t = scores.shape
        found = torch.zeros(b, h, t, dtype=torch.float32, device="cpu")
        job = _Job(b, h, m, x, t, FORMS[scores.dtype], most, torch.get_num_threads())
        given = {
            "scores": scores,
            "ends": ends[at].int().contiguous(),
            "weights": None if weights is None else weights[at].float().contiguous(),
            "real": None if real is None else real[:, :end].contiguous(),
            "asks": None if asks is None else asks[:, at].contiguous(),
            "out": found,
        }
        for name, tensor in given.items():
            setattr(job, name, None if tensor is None else tensor.data_ptr())
        if library.kvshrink_mass(byref(job)):
            raise MemoryError("attention to tokens: not enough memory")
        gather(out[:, heads, :end], found, most)
    return out
