"""What `reference.py` does, in C++ (native/held.cpp); each needs native.library()."""

from ctypes import CDLL, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.held.reference import SCALE
from kvshrink.shapes import Float, UInt8

FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EIGHT = 3  # the form of rounded rows


class _Rows(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int32) for name in ("form", "count")),
        *((name, c_int64) for name in ("row", "head", "token")),
    )


class _Job(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("batch", "heads", "x", "d", "e", "dtype", "threads")),
        ("softcap", c_float),
        *((name, _Rows) for name in ("sink_keys", "sink_values", "keys", "values")),
        *((name, c_void_p) for name in ("query", "out", "lse")),
    )


def rounded(rows: Float[Tensor, "b h w d"]) -> UInt8[Tensor, "b h w n"]:
    """As the reference."""
    rows = rows.float().contiguous()
    *outer, d = rows.shape
    out = torch.empty(*outer, d + SCALE.itemsize, dtype=torch.uint8, device="cpu")
    count = c_int64(out[..., 0].numel())
    _library().kvshrink_round(c_void_p(rows.data_ptr()), count, c_int32(d), c_void_p(out.data_ptr()))
    return out


def unrounded(stored: UInt8[Tensor, "b h w n"], dtype: torch.dtype) -> Float[Tensor, "b h w d"]:
    """As the reference."""
    stored = stored.contiguous()
    *outer, size = stored.shape
    out = torch.empty(*outer, size - SCALE.itemsize, dtype=dtype, device="cpu")
    count, d = c_int64(stored[..., 0].numel()), c_int32(out.shape[-1])
    form = c_int32(FORMS[dtype])
    _library().kvshrink_unround(c_void_p(stored.data_ptr()), count, d, form, c_void_p(out.data_ptr()))
    return out


def attend(
    query: Float[Tensor, "b h x d"],
    keys: Tensor,
    values: Tensor,
    sinks: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b h x e"], Float[Tensor, "b h x 1"]]:
    """As the reference, up to the order of sums."""
    b, h, x, d = query.shape
    e = values.shape[3] - (SCALE.itemsize if values.dtype == torch.uint8 else 0)
    query = query.float().contiguous()
    out, lse = (torch.empty(b, h, x, n, dtype=torch.float32, device="cpu") for n in (e, 1))
    job = _Job(b, h, x, d, e, FORMS[dtype], torch.get_num_threads(), softcap or 0.0)
    parts = {"keys": keys, "values": values}
    parts |= {} if sinks is None else {"sink_keys": sinks[0], "sink_values": sinks[1]}
    parts = {name: rows if rows.stride(3) == 1 else rows.contiguous() for name, rows in parts.items()}
    for name, rows in parts.items():
        size, (row, head, token, _) = rows.itemsize, rows.stride()
        form = EIGHT if rows.dtype == torch.uint8 else FORMS[rows.dtype]
        setattr(job, name, _Rows(rows.data_ptr(), form, rows.shape[2], size * row, size * head, size * token))
    job.query, job.out, job.lse = query.data_ptr(), out.data_ptr(), lse.data_ptr()
    if _library().kvshrink_held(byref(job)):
        raise MemoryError("attention: not enough memory")
    return out, lse


def _library() -> CDLL:
    library = native.library()
    assert library is not None
    return library
