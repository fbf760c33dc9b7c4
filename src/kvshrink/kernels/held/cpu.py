"""What `reference.py` does, in C++ (native/held.cpp); each needs native.library()."""

from ctypes import CDLL, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kvshrink.kernels import native
from kvshrink.kernels.held.reference import SCALE, Placed
from kvshrink.shapes import Float, UInt8

FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EIGHT = 3  # the form of rounded rows


class _Rows(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int32) for name in ("form", "count")),
        *((name, c_int64) for name in ("row", "head", "token")),
        ("table", c_void_p),
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
    keys: Tensor | Placed,
    values: Tensor | Placed,
    sinks: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b h x e"], Float[Tensor, "b h x 1"]]:
    """As the reference, up to the order of sums."""
    b, h, x, d = query.shape
    if isinstance(values, Placed):
        e = values.first.shape[1]
    else:
        e = values.shape[3] - (SCALE.itemsize if values.dtype == torch.uint8 else 0)
    query = query.float().contiguous()
    out, lse = (torch.empty(b, h, x, n, dtype=torch.float32, device="cpu") for n in (e, 1))
    job = _Job(b, h, x, d, e, FORMS[dtype], torch.get_num_threads(), softcap or 0.0)
    held = [(name, _contiguous(part)) for name, part in (("keys", keys), ("values", values))]
    if sinks is not None:
        held += [("sink_keys", _contiguous(sinks[0])), ("sink_values", _contiguous(sinks[1]))]
    for name, part in held:
        setattr(job, name, _rows(part))
    job.query, job.out, job.lse = query.data_ptr(), out.data_ptr(), lse.data_ptr()
    if _library().kvshrink_held(byref(job)):
        raise MemoryError("attention: not enough memory")
    return out, lse


def _contiguous(part: Tensor | Placed) -> Tensor | Placed:
    """With numbers of a row, and places of a table, side by side."""
    if isinstance(part, Placed):
        fits = part.at.is_contiguous() and part.at.dtype == torch.int64 and part.first.stride(1) == 1
        assert fits, "places are int64, one after the other, of rows whose numbers are so too"
        return part
    return part if part.stride(3) == 1 else part.contiguous()


def _rows(part: Tensor | Placed) -> _Rows:
    if isinstance(part, Placed):
        first, size = part.first, part.first.itemsize
        at = part.at.data_ptr() or None
        return _Rows(first.data_ptr(), FORMS[first.dtype], part.at.shape[1], 0, size * first.stride(0), 0, at)
    size, (row, head, token, _) = part.itemsize, part.stride()
    form = EIGHT if part.dtype == torch.uint8 else FORMS[part.dtype]
    return _Rows(part.data_ptr(), form, part.shape[2], size * row, size * head, size * token, None)


def _library() -> CDLL:
    library = native.library()
    assert library is not None
    return library
