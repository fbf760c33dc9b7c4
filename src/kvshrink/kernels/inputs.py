"""What kernels of decode attention are given, checked before a pointer is taken: shapes, dtypes and devices.

A kernel reads as many bytes as form, width, bits and page say, whatever the tensors hold. The checks compare a few
shapes a call, which takes microseconds; how a form's tensors must look is worked out once.
"""

from functools import cache
from math import inf

import torch
from torch import Tensor

from kvshrink.errors import CacheError
from kvshrink.kernels.decode.reference import Basis, Turn
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.pack import packed_bytes

RAW = (torch.float32, torch.bfloat16, torch.float16)
# what stands beside the codes of each form
NUMBERS = {"channel": ("scale", "low"), "token": ("scale", "low"), "table": ("scale",), "normal": ("gain",)}

Part = tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]


def check(
    query: Tensor,
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    values: Packed,
    visible: Tensor | None,
    softcap: float | None,
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
    if turn is not None:
        _check(
            "positions",
            turn.positions,
            (1 if len(turn.positions) == 1 else b, tokens),
            device,
            (torch.int32, torch.int64),
        )
        _check("frequencies", turn.inv_freq, (min(turn.inv_freq.numel(), wide // 2),), device)
    if visible is not None:
        alike = (1 if size == 1 else full for size, full in zip(visible.shape, (b, h, x), strict=False))
        _check("mask", visible, (*alike, tokens), device, (torch.bool,))
    if softcap is not None and not 0 < softcap < inf:
        raise _refusal("soft-cap", str(softcap), "a positive number")
    return pages


def whole(tensor: Tensor) -> Tensor:
    """The same with what lies within a page and group in one piece; copied only if it does not."""
    wanted = 1
    for size, stride in zip(tensor.shape[:2:-1], tensor.stride()[:2:-1], strict=True):
        if size > 1 and stride != wanted:
            return tensor.contiguous()
        wanted *= size
    return tensor


def _check_side(name: str, packed: Packed, b: int, heads: int, device: torch.device) -> tuple[int, int]:
    """(pages, groups)."""
    outer = next((tensor.shape[:3] for tensor in packed.stored.values()), ())
    pages, groups = outer[1:] if len(outer) == 3 else (0, 0)
    if groups == 0 or heads % groups:
        raise _refusal(name, f"{groups} groups", f"a divisor of {heads} heads")
    for part, inner, dtypes in _parts(packed.form, packed.width, packed.page, packed.runs, packed.group):
        tensor = packed.stored.get(part)
        if tensor is None:
            raise _refusal(f"{part} of {name}", "missing", "there")
        _check(f"{part} of {name}", tensor, (b, pages, groups, *inner), device, dtypes)
    if packed.form == "table":
        count = None if packed.levels is None else tuple(packed.levels.shape)
        if count != (2 ** packed.runs[0][0],):
            raise _refusal(f"levels of {name}", str(count), str(2 ** packed.runs[0][0]))
    return pages, groups


@cache
def _parts(form: str, width: int, page: int, runs: tuple[tuple[int, int], ...], group: int) -> tuple[Part, ...]:
    """(name, shape of a page and group, dtypes) of each tensor, as kernels/latents says."""
    if form == "raw":
        return (("latent", (page, width), RAW),)
    whole = sum(channels for _, channels in runs) == width and all(channels > 0 for _, channels in runs)
    if form not in NUMBERS or not whole or (len(runs) != 1 and form != "normal") or (group < 1 and form != "channel"):
        raise _refusal("pages", f"{form!r} of runs {runs} and groups of {group}", f"a known form of {width} channels")
    codes = sum(packed_bytes(page * channels, bits) for bits, channels in runs)
    shares = -(-width // max(1, group))
    numbers = {"channel": (width,), "normal": (shares,)}.get(form, (page, shares))
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
