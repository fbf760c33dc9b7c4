"""What C++ is asked over stored pages: the job of kernels/decode/native/job.h, from tensors.

Pointers are to what a list holds for the call, or to what records keep of themselves, which never change.
"""

import ctypes
import threading
import weakref
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels import inputs, native
from kvshrink.kernels.decode.reference import Basis, Constant, Live, Turn
from kvshrink.kernels.known import Known
from kvshrink.kernels.latents import MIXED, Packed, level_table
from kvshrink.kernels.records import Records
from kvshrink.shapes import Bool, Float

PAGE = 32
FORMS = {"channel": 3, "token": 4, "table": 4, "normal": 5, "trellis": 5}  # a table is of tokens whose minima are 0
RAW = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SAME = torch.arange(256, dtype=torch.float32, device="cpu").repeat(9, 1)  # codes that are numbers
_PREPARING = threading.Lock()


class Side(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("form", "groups", "width", "group", "runs", "lanes", "trellis")),
        *((name, c_void_p) for name in ("bits", "channels", "table", "zeros")),
        *((f"{name}_{what}", c_int64) for name in ("data", "scale", "low") for what in ("at", "group")),
        ("levels", c_void_p),
    )


class Job(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("batch", "heads", "x", "wide", "pages", "threads", "pairs", "interleaved")),
        *((name, Side) for name in ("keys", "values")),
        *((name, c_void_p) for name in ("query", "rebuild", "up", "mean", "inv_freq")),
        *((name, c_float) for name in ("scaling", "softcap")),
        *((name, c_int32) for name in ("constant_wide", "only_scores")),
        *((name, c_void_p) for name in ("constant_query", "constant")),
        ("positions", c_void_p),
        ("positions_row", c_int64),
        *((name, c_void_p) for name in ("counts", "skips", "visible")),
        *((f"visible_{axis}", c_int64) for axis in ("row", "head", "x", "token")),
        *((name, c_void_p) for name in ("out", "lse", "scores")),
    )


def job_of(
    query: Float[Tensor, "b h x e"],
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    visible: Bool[Tensor, "#b #h #x t"] | None,
    softcap: float | None,
    precision: torch.dtype,
    live: Live,
    constant: Constant | None,
    pages: int,
    held: list[Any],
) -> Job:
    """All of a job but values and results. held: takes what its pointers point to."""
    b, h, x, wide = query.shape
    job = Job(batch=b, heads=h, x=x, wide=wide, pages=pages, threads=torch.get_num_threads())
    job.keys = side_of(keys, held)
    job.query = pointer(query.float().contiguous(), held)
    if basis is not None:
        _turning(job, turn, b, held)
        held.append(_prepared(job, basis, turn, precision == torch.bfloat16))
        job.rebuild = held[-1].address
    if constant is not None:
        _turning(job, constant.turn, b, held)
        job.constant_wide = constant.query.shape[3]
        job.constant_query = pointer(constant.query.float().contiguous(), held)
        job.constant = pointer(constant.part.float().contiguous(), held)
    if live.counts is not None:
        job.counts = pointer(live.counts.contiguous(), held)
    if live.skips is not None:
        job.skips = pointer(live.skips.contiguous(), held)
    if visible is not None:
        seen = visible.expand(b, h, x, -1)
        job.visible = pointer(seen, held)
        job.visible_row, job.visible_head, job.visible_x, job.visible_token = seen.stride()
    job.softcap = softcap or 0.0
    return job


def _turning(job: Job, turn: Turn | None, b: int, held: list[Any]) -> None:
    if turn is None:
        return
    positions = turn.positions.to(torch.int32).expand(b, -1)
    positions = positions if positions.stride(1) == 1 else positions.contiguous()
    job.pairs, job.interleaved, job.scaling = len(turn.inv_freq), turn.interleaved, turn.scaling
    job.inv_freq = pointer(turn.inv_freq.float().contiguous(), held)
    job.positions, job.positions_row = pointer(positions, held), positions.stride(0)


class _Prepared:
    """A basis as products read it: made once, since that takes as long as reading some hundred tokens."""

    def __init__(self, job: Job, basis: Basis, pairs: bool) -> None:
        library = native.library()
        assert library is not None
        library.kvshrink_prepare.restype = c_void_p
        held: list[Any] = []
        job.up, job.mean = (pointer(t.float().contiguous(), held) for t in (basis.up, basis.mean))
        self.address = library.kvshrink_prepare(byref(job), c_int32(pairs))
        if not self.address:
            raise MemoryError("decode attention: not enough memory for a basis")
        job.up = job.mean = None
        weakref.finalize(self, library.kvshrink_forget, c_void_p(self.address), c_int32(pairs))


def _prepared(job: Job, basis: Basis, turn: Turn | None, pairs: bool) -> _Prepared:
    turned = None if turn is None else (turn.inv_freq.float().numpy().tobytes(), turn.interleaved)
    key = ("cpu", job.heads, job.wide, pairs, turned)
    with _PREPARING:  # another thread may be at its first step with the same artifact
        if key not in basis.prepared:
            basis.prepared[key] = _Prepared(job, basis, pairs)
        found: _Prepared = basis.prepared[key]
        return found


def side_of(packed: Packed, held: list[Any]) -> Side:
    """A side as C++ reads it; of the same records, which never change, it is made once."""
    records = inputs.records(packed)
    if records is not packed.stored:
        held.append(records)
        return _made_side(packed, records, held)
    key = ("side", *inputs.form_of(packed))
    if key not in records.prepared:
        kept: list[Any] = []
        records.prepared[key] = _made_side(packed, records, kept), kept
    found: Side = records.prepared[key][0]
    return found


def _made_side(packed: Packed, records: Records, held: list[Any]) -> Side:
    key = (*inputs.form_of(packed), *records.identity)
    owners = (packed.levels, records.layout.fields)
    made = _DESCRIBED.find(key, owners, lambda: _describe(packed, records))
    side, table = Side.from_buffer_copy(made.side), records.addresses
    held += [table, made]
    side.table = table.ctypes.data
    return side


class _Described(NamedTuple):
    """A side but for its table, the same for all pages of a layout. held: what it points to."""

    side: Side
    held: list[Any]


_DESCRIBED = Known[_Described]()


def _describe(packed: Packed, records: Records) -> _Described:
    held: list[Any] = []
    raw = packed.form == "raw"
    data = records.field("latent" if raw else "codes")
    side = Side(
        form=RAW[data.dtype] if raw else FORMS[packed.form],
        groups=data.shape[0] * records.lanes,
        width=packed.width,
        group=max(1, packed.group),
        runs=len(packed.runs),
        lanes=records.lanes,
        trellis=packed.form == "trellis",
        levels=pointer(_levels(packed), held),
    )
    side.bits, side.channels = (ctypes.addressof(a) for a in _runs(packed.runs))
    if packed.form == "table":
        side.zeros = pointer(torch.zeros(records.field("scale").shape[1:], dtype=torch.float16, device="cpu"), held)
    parts = dict(zip(("scale", "low"), inputs.NUMBERS.get(packed.form, ()), strict=False))
    for part, field in {"data": data, **{part: records.field(name) for part, name in parts.items()}}.items():
        setattr(side, f"{part}_at", field.offset)
        setattr(side, f"{part}_group", field.nbytes // max(1, field.shape[0]))
    return _Described(side, held)


def pointer(tensor: Tensor, held: list[Any]) -> int:
    held.append(tensor)
    return tensor.data_ptr()


@cache
def _runs(runs: tuple[tuple[int, int], ...]) -> tuple[ctypes.Array[Any], ctypes.Array[Any]]:
    kind = c_int32 * max(1, len(runs))
    return kind(*(bits for bits, _ in runs)), kind(*(channels for _, channels in runs))


def _levels(packed: Packed) -> Float[Tensor, "9 256"]:
    """What a code of so many bits stands for, before scale and minimum."""
    if packed.levels is None:
        return level_table(packed.form) if packed.form in MIXED else _SAME
    table = torch.zeros(9, 256, dtype=torch.float32, device="cpu")
    table[packed.runs[0][0], : len(packed.levels)] = packed.levels.cpu()
    return table
