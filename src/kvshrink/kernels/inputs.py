"""What kernels of decode attention are given, checked before a pointer is taken: shapes, dtypes and devices.

A kernel reads as many bytes as form, width, bits and page say, whatever the tensors hold. The checks compare a few
shapes a call, which takes microseconds; how a form's tensors must look is worked out once.
"""

from collections.abc import Callable, Mapping
from functools import cache
from math import inf
from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import CacheError
from kvshrink.kernels.decode.reference import Basis, Constant, Live, Turn
from kvshrink.kernels.known import Known
from kvshrink.kernels.latents import MIXED, Packed
from kvshrink.kernels.pack import packed_bytes
from kvshrink.kernels.records import Records, recorded

RAW = (torch.float32, torch.bfloat16, torch.float16)
# what stands beside the codes of each form
NUMBERS = {"channel": ("scale", "low"), "token": ("scale", "low"), "table": ("scale",)} | dict.fromkeys(
    MIXED, ("gain",)
)

Part = tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]


def check(
    query: Tensor,
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    values: Packed,
    visible: Tensor | None,
    softcap: float | None,
    live: Live,
    constant: Constant | None = None,
) -> int:
    """How many pages there are. Raises CacheError on what a kernel would read beyond its end, or as what it is not."""
    b, h, x, wide = query.shape
    device = query.device
    pages, groups = _check_side("keys", keys, b, h, device)
    tokens = pages * keys.page
    if (_check_side("values", values, b, h, device)[0], values.page) != (pages, keys.page):
        raise _refusal("pages of values", "others", f"{pages} of {keys.page} tokens, as of keys")
    if basis is not None:
        _check("basis", basis.up, (groups, keys.width, h // groups * wide), device)
        _check("mean", basis.mean, (groups, h // groups * wide), device)
    elif wide != keys.width or turn is not None:
        raise _refusal("queries", f"{wide} channels{' and positions' * (turn is not None)}", f"{keys.width} as of keys")
    _check_turn(turn, b, tokens, wide, device)
    if constant is not None:
        d = constant.query.shape[-1]
        _check("queries before their basis", constant.query, (b, h, x, d), device)
        _check("constant of keys", constant.part, (h, d), device)
        _check_turn(constant.turn, b, tokens, d, device)
        if basis is not None:
            raise _refusal("constant of keys", "beside a basis that rebuilds them", "one of both")
    lanes = keys.stored.lanes if isinstance(keys.stored, Records) else 1
    if live.counts is not None:
        _check("slots filled", live.counts, (b, lanes, pages), device, (torch.uint8,))
        if device.type == "cpu" and live.counts.numel() and int(live.counts.max()) > keys.page:
            raise _refusal("slots filled", str(int(live.counts.max())), f"at most {keys.page}")
    if live.skips is not None:
        _check("slots left out", live.skips, (b,), device, (torch.int32,))
    if visible is not None:
        alike = (1 if size == 1 else full for size, full in zip(visible.shape, (b, h, x), strict=False))
        _check("mask", visible, (*alike, tokens), device, (torch.bool,))
    if softcap is not None and not 0 < softcap < inf:
        raise _refusal("soft-cap", str(softcap), "a positive number")
    return pages


def _check_turn(turn: Turn | None, b: int, tokens: int, wide: int, device: torch.device) -> None:
    if turn is not None:
        rows = 1 if len(turn.positions) == 1 else b
        _check("positions", turn.positions, (rows, tokens), device, (torch.int32, torch.int64))
        _check("frequencies", turn.inv_freq, (min(turn.inv_freq.numel(), wide // 2),), device)


def records(packed: Packed) -> Records:
    """The pages as records; copied only where they were given as tensors."""
    return packed.stored if isinstance(packed.stored, Records) else recorded(packed.stored)


def _check_side(name: str, packed: Packed, b: int, heads: int, device: torch.device) -> tuple[int, int]:
    """(pages, groups). Of the same records, which never change, it is found once."""
    if not isinstance(packed.stored, Records):
        return _checked_side(name, packed, b, heads, device)
    key, known = (name, b, heads, device, *form_of(packed)), packed.stored.prepared
    if key not in known:
        known[key] = _checked_side(name, packed, b, heads, device)
    found: tuple[int, int] = known[key]
    return found


def check_pages(packed: Packed, records: Records) -> None:
    """Raises CacheError on pages, as these records, that a kernel would read beyond their end."""
    groups = records.field("codes").shape[0] * records.lanes if "codes" in records else 0
    _check_side("pages", packed._replace(stored=records), len(records.addresses), groups or 1, records.holder.device)


def form_of(packed: Packed) -> tuple[Any, ...]:
    """All that a Packed says beside its records."""
    return packed.form, packed.width, packed.page, packed.runs, packed.group, id(packed.levels)


def _checked_side(name: str, packed: Packed, b: int, heads: int, device: torch.device) -> tuple[int, int]:
    stored = packed.stored
    if not isinstance(stored, Records):
        return _checked_parts(name, packed, b, heads, device, _tensor)
    if stored.holder.device != device:
        raise _refusal(name, f"on {stored.holder.device}", f"on {device}")
    table, lanes = stored.addresses.shape, (b, stored.lanes, stored.pages)
    if table != lanes:
        raise _refusal(f"table of {name}", str(list(table)), str(list(lanes)))
    # an engine puts pages of one layout together in each step: their tensors are looked at once
    key, owners = (name, heads, *form_of(packed), *stored.identity), (packed.levels, stored.layout.fields)
    groups = _GROUPS.find(key, owners, lambda: _checked_parts(name, packed, b, heads, device, _field)[1])
    return stored.pages, groups


_GROUPS = Known[int]()


def _checked_parts(
    name: str, packed: Packed, b: int, heads: int, device: torch.device, of: "Callable[..., Found]"
) -> tuple[int, int]:
    stored = packed.stored
    first = of(stored, next(iter(stored), ""))
    pages, groups = first[0][1:3] if first is not None and len(first[0]) >= 3 else (0, 0)
    if groups == 0 or heads % groups:
        raise _refusal(name, f"{groups} groups", f"a divisor of {heads} heads")
    for part, inner, dtypes in _parts(packed.form, packed.width, packed.page, packed.runs, packed.group):
        found = of(stored, part)
        if found is None:
            raise _refusal(f"{part} of {name}", "missing", "there")
        shape, dtype, where = found
        wanted = (b, pages, groups, *inner)
        if shape != wanted or dtype not in dtypes or where not in (device, None):
            got = f"{_named(dtype)} {list(shape)} on {where or device}"
            raise _refusal(f"{part} of {name}", got, f"{' or '.join(map(_named, dtypes))} {list(wanted)} on {device}")
    if packed.form == "table":
        count = None if packed.levels is None else tuple(packed.levels.shape)
        if count != (2 ** packed.runs[0][0],):
            raise _refusal(f"levels of {name}", str(count), str(2 ** packed.runs[0][0]))
    return pages, groups


Found = tuple[tuple[int, ...], torch.dtype, torch.device | None] | None  # shape [b, p, G, ...], dtype, device


def _tensor(stored: Mapping[str, Tensor], name: str) -> Found:
    tensor = stored.get(name)
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)


def _field(stored: Records, name: str) -> Found:
    """What a tensor would be, without making it."""
    if name not in stored:
        return None
    field = stored.field(name)
    inner = (field.shape[0] * stored.lanes, *field.shape[1:]) if field.shape else ()
    return (stored.addresses.shape[0], stored.pages, *inner), field.dtype, None


@cache
def _parts(form: str, width: int, page: int, runs: tuple[tuple[int, int], ...], group: int) -> tuple[Part, ...]:
    """(name, shape of a page and group, dtypes) of each tensor, as kernels/latents says."""
    if form == "raw":
        return (("latent", (page, width), RAW),)
    whole = sum(channels for _, channels in runs) == width and all(channels > 0 for _, channels in runs)
    if form not in NUMBERS or not whole or (len(runs) != 1 and form not in MIXED) or (group < 1 and form != "channel"):
        raise _refusal("pages", f"{form!r} of runs {runs} and groups of {group}", f"a known form of {width} channels")
    codes = sum(packed_bytes(page * channels, bits) for bits, channels in runs)
    shares = -(-width // max(1, group))
    numbers = {"channel": (width,), **dict.fromkeys(MIXED, (shares,))}.get(form, (page, shares))
    return (("codes", (codes,), (torch.uint8,)), *((name, numbers, (torch.float16,)) for name in NUMBERS[form]))


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    if tensor.shape != shape or tensor.device != device or (dtypes is not None and tensor.dtype not in dtypes):
        got = f"{_named(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
        wanted = " or ".join(map(_named, dtypes or (tensor.dtype,)))
        raise _refusal(name, got, f"{wanted} {list(shape)} on {device}")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(name: str, got: str, wanted: str) -> CacheError:
    return CacheError(
        f"cannot attend to these pages: {name}: {got}, not {wanted}. The cache is damaged; build it again."
    )
