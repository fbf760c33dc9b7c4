"""The fused decode attention of `reference.py` in C++ (native/decode.cpp), for pages of 32 tokens on a CPU.

Products are of bfloat16 pairs where the model is bfloat16 and the processor has them, else of float32. Differences from
the reference, all below what bfloat16 itself loses: those roundings, and that a key is turned by its page's angle and
then its own place in the page, with angles in float64.
"""

from ctypes import byref, c_int32
from typing import Any

import torch
from torch import Tensor

from kvshrink.kernels import inputs, native
from kvshrink.kernels.decode.reference import ALL, Basis, Constant, Live, Turn
from kvshrink.kernels.jobs import PAGE as PAGE
from kvshrink.kernels.jobs import RAW as RAW
from kvshrink.kernels.jobs import job_of, side_of
from kvshrink.kernels.latents import Packed
from kvshrink.shapes import Bool, Float


def decode(
    query: Float[Tensor, "b h x e"],
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    values: Packed,
    visible: Bool[Tensor, "#b #h #x t"] | None,
    softcap: float | None,
    precision: torch.dtype,
    live: Live = ALL,
    constant: Constant | None = None,
) -> tuple[Float[Tensor, "b h x r"], Float[Tensor, "b h x 1"]]:
    """As the reference, for pages of PAGE tokens on a CPU; needs native.library()."""
    library = native.library()
    assert library is not None
    assert query.is_cpu
    assert keys.page == PAGE
    pages = inputs.check(query, keys, basis, turn, values, visible, softcap, live, constant)
    b, h, x, _ = query.shape
    held: list[Any] = []  # what the pointers of the job point to
    out, lse = (torch.empty(b, h, x, n, dtype=torch.float32, device="cpu") for n in (values.width, 1))
    if lse.numel() == 0:
        return out, lse
    job = job_of(query, keys, basis, turn, visible, softcap, precision, live, constant, pages, held)
    job.values = side_of(values, held)
    job.out, job.lse = out.data_ptr(), lse.data_ptr()
    if library.kvshrink_decode(byref(job), c_int32(precision == torch.bfloat16)):
        raise MemoryError("decode attention: not enough memory")
    return out, lse
