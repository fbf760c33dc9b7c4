"""Quantisers on the latents of a basis: what they learn there, and their change of basis folded into it."""

from functools import lru_cache

import torch
from torch import Tensor

from kvshrink import methods
from kvshrink.errors import SettingError
from kvshrink.methods._ladder import Ladder
from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, prefixed
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import KV, CalibrationStats

Basis = tuple[Tensor, Tensor, Tensor]  # down [G, a, r], up [G, r, a], mean [G, a]; up @ down = 1


@lru_cache(typed=True)  # 2.0 is not 2, also when 2 was asked for before
def quantiser(name: str, bits: int | float | None) -> Quantiser:
    """The quantiser called `name` at these bits, else with its defaults. Raises SettingError if there is none."""
    found = methods.get(name)
    if not issubclass(found, Quantiser) or not found.of_latents:
        known = ", ".join(n for n in methods.names() if issubclass(c := methods.get(n), Quantiser) and c.of_latents)
        raise SettingError(f"codec={name!r} does not store latents. Use one of {known}.")
    built = methods.build(name, {} if bits is None else {"bits": bits})
    assert isinstance(built, Quantiser)
    return built


def learn(method: Quantiser, kv: KV, fitted: Fitted, stats: CalibrationStats, page: int) -> dict[str, Tensor]:
    """What the quantiser learns from the latents of a fitted basis."""
    down, up, mean = basis_of(fitted, kv)
    side_stats = SideStats.of(stats, kv, "k_pre").projected(down, up, mean)
    found = method.learn(kv, side_stats, Space(up.shape[0], up.shape[1], page, stats.shape.dtype, False))
    return {f"{kv}_codec_{k}": t.contiguous() for k, t in found.items()}


def packing(method: Quantiser, kv: KV, space: Space, fitted: Fitted) -> Packing:
    return method.packing(kv, space, prefixed(fitted, f"{kv}_codec"))


def ladder(method: Quantiser, kv: KV, space: Space, fitted: Fitted) -> Ladder:
    return method.ladder(kv, space, prefixed(fitted, f"{kv}_codec"))


def transformed(method: Quantiser, kv: KV, basis: Basis, fitted: Fitted, dtype: torch.dtype, page: int) -> Basis:
    """The basis with the quantiser's transform folded in."""
    down, up, mean = basis
    space = Space(up.shape[0], up.shape[1], page, dtype, False)
    transform = method.transform(kv, space, prefixed(fitted, f"{kv}_codec"))
    if transform is None:
        return basis
    transform = transform.to(down.device)
    return down @ transform.down, transform.up @ up, mean + (transform.mean[:, None] @ up)[:, 0]


def basis_of(fitted: Fitted, kv: KV) -> Basis:
    up = fitted[f"{kv}_up"]
    return fitted.get(f"{kv}_down", up.transpose(1, 2)), up, fitted[f"{kv}_mean"]
