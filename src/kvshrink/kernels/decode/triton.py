"""The fused decode attention of `reference.py` as Triton programs (gpu/), for CUDA devices.

The pages are split into ranges, so that a few rows of queries fill the whole device; a second program joins the ranges.
Grids depend on shapes alone and nothing is read back, so that calls can be captured in a CUDA graph, once the same
shapes have been called: the first call compiles and chooses among CONFIGS. Factors of products are rounded to
`precision`; sums, softmax and angles are float32.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvshrink.kernels import inputs
from kvshrink.kernels.decode.gpu.attend import attend
from kvshrink.kernels.decode.gpu.join import join
from kvshrink.kernels.decode.gpu.side import constants, side
from kvshrink.kernels.decode.reference import ALL, Basis, Constant, Live, Turn
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.rope import wave_table, waves
from kvshrink.shapes import Bool, Float

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the programs run in numpy, on CPU tensors
RANGE = 4  # pages of a range are a multiple of this, so of any config's tile
PER_PROCESSOR = 4  # programs that a multiprocessor has to work on in turn or at a time
MOST_RANGES = 128
ROW_ELEMENTS = 2**14  # rows times value channels of a program's sum, 64 KiB of registers
AT_ONCE = 4096  # tokens whose angles are alive at a time
BASIS_BYTES = 2**16  # of a head's basis that a program keeps; a larger one is read again for each tile, in parts

CONFIGS = [
    triton.Config({"P": pages}, num_warps=warps, num_stages=stages)
    for pages, warps, stages in ((1, 4, 1), (1, 4, 2), (2, 4, 2), (4, 8, 2))  # the first needs least memory
]
KEY = [
    *(f"{name}_{what}" for name in "KV" for what in ("FORM", "BITS", "DATA", "WIDTH", "GROUPS", "SHARE")),
    *("REBUILT", "WIDE", "PAIRS", "MASKED", "ADDED", "DTYPE", "T", "ROWS"),
]
_tuned = triton.autotune(CONFIGS[2:3] if INTERPRETED else CONFIGS, key=KEY)(attend)


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
    """As the reference, for pages that gpu/side.py: fits. What a constant of the keys adds is made beforehand."""
    b, h, x, _ = query.shape
    if inputs.check(query, keys, basis, turn, values, visible, softcap, live, constant) == 0 or b * h * x == 0:
        return query.new_zeros(b, h, x, values.width), query.new_full((b, h, x, 1), -torch.inf)
    with torch.cuda.device_of(query):  # triton launches on the current device, whatever its tensors are on
        added = None if constant is None else _added(constant, keys.page * inputs.records(keys).pages)
        parts, sums = _ranges(query, keys, basis, turn, values, visible, softcap, precision, live, added)
        if parts.shape[2] == 1:
            return parts[:, :, 0], sums[:, :, 0, :, None]
        ranges, width = parts.shape[2], parts.shape[4]
        out, lse = parts.new_empty(b, h, x, width), parts.new_empty(b, h, x, 1)
        channels = min(128, _power(width))
        join[(b * h * x, triton.cdiv(width, channels))](parts, sums, out, lse, x, ranges, WIDTH=width, C=channels)
        return out, lse


def _ranges(
    query: Tensor,
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    values: Packed,
    visible: Tensor | None,
    softcap: float | None,
    precision: torch.dtype,
    live: Live,
    added: Float[Tensor, "b h x t"] | None,
) -> tuple[Float[Tensor, "b h ranges x r"], Float[Tensor, "b h ranges x"]]:
    """(weighted sum of value latents, log-sum-exp) of each range of pages."""
    b, h, x, wide = query.shape
    of_keys, of_values = inputs.records(keys), inputs.records(values)
    pages = of_keys.pages
    rows = max(16, min(64, triton.next_power_of_2(x), ROW_ELEMENTS // triton.next_power_of_2(values.width)))
    blocks = triton.cdiv(x, rows)
    size = _range(pages, b * h * blocks, query.device)
    ranges = triton.cdiv(pages, size)
    out = query.new_empty(b, h, ranges, x, values.width, dtype=torch.float32)
    lse = query.new_empty(b, h, ranges, x, dtype=torch.float32)
    positions = None if turn is None else _rows(turn.positions).expand(b, -1)
    counts = None if live.counts is None else _rows(live.counts)
    flags = None if visible is None else _rows(visible).expand(b, h, x, -1).view(torch.uint8)
    _tuned[(b * h, ranges, blocks)](
        query.float().contiguous(),
        side(keys, of_keys),
        of_keys.device_addresses,
        *((None, None) if basis is None else (basis.up.contiguous(), basis.mean.contiguous())),
        positions,
        None if turn is None else turn.inv_freq.contiguous(),
        side(values, of_values),
        of_values.device_addresses,
        counts,
        None if live.skips is None else live.skips.contiguous(),
        flags,
        added,
        out,
        lse,
        h,
        x,
        pages,
        size,
        0 if positions is None else positions.stride(0),
        *((0, 0) if counts is None else counts.stride()[:2]),
        *((0, 0, 0) if flags is None else flags.stride()[:3]),
        0 if added is None else added.shape[3],
        1.0 if turn is None else turn.scaling,
        softcap or 1.0,
        **constants(keys, of_keys, "K"),
        **constants(values, of_values, "V"),
        REBUILT=basis is not None,
        WIDE=wide,
        PAIRS=0 if turn is None else len(turn.inv_freq),
        INTERLEAVED=turn is not None and turn.interleaved,
        CAPPED=softcap is not None,
        COUNTED=counts is not None,
        SKIPPING=live.skips is not None,
        MASKED=visible is not None,
        ADDED=added is not None,
        DTYPE=getattr(tl, str(precision).removeprefix("torch.")),
        T=keys.page,
        ROWS=rows,
        K_CHUNK=_chunk(keys.width, precision.itemsize * _power(wide)),
        V_ALL=_power(values.width),
    )
    return out, lse


def _added(constant: Constant, tokens: int) -> Float[Tensor, "b h x t"]:
    """What a constant of the keys adds to each score. In float64, some tokens at a time: it may be hundreds of times
    what varies, and a caller may allow products of float32 to be rounded."""
    query, turn = constant.query.double(), constant.turn
    inv_freq = query.new_zeros(0) if turn is None else turn.inv_freq.double()
    positions = torch.zeros(1, tokens, device=query.device) if turn is None else turn.positions
    rows = waves(query, constant.part.double(), len(inv_freq), turn is not None and turn.interleaved)
    found = torch.empty(*query.shape[:3], tokens, device=query.device)
    for at in range(0, tokens, AT_ONCE):
        angles = positions[:, at : at + AT_ONCE, None].double() * inv_freq
        scaling = 1.0 if turn is None else turn.scaling
        found[..., at : at + AT_ONCE] = rows @ wave_table(angles.cos() * scaling, angles.sin() * scaling).mT
    return found


def _power(count: int) -> int:
    """The width of a tile that holds so many channels: a power of two that a product takes."""
    found: int = max(16, triton.next_power_of_2(count))
    return found


def _chunk(width: int, latent_bytes: int) -> int:
    """Key latents that a product takes at a time, where one has so many bytes of a head's basis or queries."""
    most = BASIS_BYTES // latent_bytes
    return _power(width) if _power(width) <= most else max(16, most // 4)


def _range(pages: int, programs: int, device: torch.device) -> int:
    """Pages of a range: enough ranges to fill the device."""
    wanted = min(MOST_RANGES, triton.cdiv(PER_PROCESSOR * _processors(device), programs))
    found: int = triton.cdiv(pages, wanted * RANGE) * RANGE
    return found


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _rows(tensor: Tensor) -> Tensor:
    """The same with neighbours along the last axis next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
