"""How fast a device multiplies and reads, measured: what decides whether rebuilding keys hides behind reading them."""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from kvshrink.errors import SettingError

ROUNDS = 5  # the fastest counts: whatever else runs only slows one down
SECONDS = 0.06  # after which no more rounds are begun
# (tokens, latents, channels) of the product that rebuilds keys. On a GPU enough latents that writing the result, which
# a fused kernel never does, is not what is timed.
PRODUCT = {"cpu": (128, 128, 1024), "cuda": (8192, 512, 1024)}
COPIED = {"cpu": 2**26, "cuda": 2**28}  # bytes, more than most caches keep
AT_ONCE = {"cpu": 1, "cuda": 20}  # calls in a row, so that starting them is not what is timed


class Ceilings(NamedTuple):
    """flops: floating-point operations a second of a matrix product, a multiplication and an addition being two.
    bandwidth: bytes a second, read and written together."""

    flops: float
    bandwidth: float


def measure(device: torch.device | str, dtype: torch.dtype) -> Ceilings:
    """Of this device for products of this dtype: measured once per process, in a fraction of a second.

    Raises SettingError on a device that is neither a CPU nor a CUDA GPU.
    """
    device = torch.device(device)
    if device.type not in PRODUCT:
        raise SettingError(f"the speed of {device.type!r} is not known. Set group_heads to a number, or None.")
    index = (device.index if device.index is not None else torch.cuda.current_device()) if device.type == "cuda" else 0
    return _measure(device.type, index, dtype)


@cache
def _measure(kind: str, index: int, dtype: torch.dtype) -> Ceilings:
    device = torch.device(kind, index)
    tokens, latents, channels = PRODUCT[kind]
    with torch.inference_mode():
        latent = torch.ones(tokens, latents, device=device, dtype=dtype)
        basis = torch.ones(latents, channels, device=device, dtype=dtype)
        rows = torch.empty(tokens, channels, device=device, dtype=dtype)
        product = _seconds(lambda: torch.mm(latent, basis, out=rows), device)
        source = torch.ones(COPIED[kind], device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy = _seconds(lambda: target.copy_(source), device)
    return Ceilings(2 * tokens * latents * channels / product, 2 * COPIED[kind] / copy)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call: the fastest of some rounds, after one that warms up."""
    call()
    best, started = float("inf"), time.perf_counter()
    for _ in range(ROUNDS):
        best = min(best, _round(call, device, AT_ONCE[device.type]))
        if time.perf_counter() - started > SECONDS:
            break
    return best


def _round(call: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls
