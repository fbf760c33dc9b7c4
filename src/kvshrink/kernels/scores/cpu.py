"""What `reference.py` does, in C++ (kernels/decode/native), for pages of 32 tokens; needs native.library()."""

from ctypes import byref, c_int32
from typing import Any

import torch
from torch import Tensor

from kvshrink.kernels import inputs, native
from kvshrink.kernels.decode.reference import ALL, Basis, Constant, Live, Turn
from kvshrink.kernels.jobs import Side, job_of
from kvshrink.kernels.latents import Packed
from kvshrink.shapes import Float


def scores(
    query: Float[Tensor, "b h x e"],
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    softcap: float | None,
    precision: torch.dtype,
    live: Live = ALL,
    constant: Constant | None = None,
) -> Float[Tensor, "b h x t"]:
    """As the reference, with `decode`'s roundings."""
    library = native.library()
    assert library is not None
    pages = inputs.check(query, keys, basis, turn, keys, None, softcap, live, constant)
    b, h, x, _ = query.shape
    held: list[Any] = []
    found = torch.full((b, h, x, pages * keys.page), -torch.inf, dtype=torch.float32, device="cpu")
    if found.numel() == 0:
        return found
    lse = torch.empty(b, h, x, dtype=torch.float32, device="cpu")
    job = job_of(query, keys, basis, turn, None, softcap, precision, live, constant, pages, held)
    job.values, job.only_scores = Side(group=1), 1
    job.out = job.lse = lse.data_ptr()
    job.scores = found.data_ptr()
    if library.kvshrink_decode(byref(job), c_int32(precision == torch.bfloat16)):
        raise MemoryError("scores of stored keys: not enough memory")
    return found
