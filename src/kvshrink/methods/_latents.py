"""Quantisers on the latents of a basis: what they learn there, and their change of basis folded into it."""

from functools import lru_cache

import torch
from torch import Tensor

from kvshrink import methods
from kvshrink.errors import SettingError
from kvshrink.methods._facts import LayerFacts
from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Ladder, Quantiser, Side, Site, Space, of_side
from kvshrink.methods._roles import Fitted

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


def learn(method: Quantiser, side: Side, fitted: Fitted, facts: LayerFacts, page: int) -> dict[str, Tensor]:
    """What the quantiser learns from the latents of a fitted basis."""
    down, up, mean = basis_of(fitted, side)
    site = Site.of(facts, side, "k_pre").through(down, up, mean)
    found = method.learn(side, site, Space(up.shape[0], up.shape[1], page, facts.shape.dtype, False))
    return {f"{side}_codec_{k}": t.contiguous() for k, t in found.items()}


def packing(method: Quantiser, side: Side, space: Space, fitted: Fitted) -> Packing:
    return method.packing(side, space, of_side(fitted, f"{side}_codec"))


def ladder(method: Quantiser, side: Side, space: Space, fitted: Fitted) -> Ladder:
    return method.ladder(side, space, of_side(fitted, f"{side}_codec"))


def changed(method: Quantiser, side: Side, basis: Basis, fitted: Fitted, dtype: torch.dtype, page: int) -> Basis:
    """The basis with the quantiser's change folded in."""
    down, up, mean = basis
    space = Space(up.shape[0], up.shape[1], page, dtype, False)
    change = method.change(side, space, of_side(fitted, f"{side}_codec"))
    if change is None:
        return basis
    change = change.to(down.device)
    return down @ change.down, change.up @ up, mean + (change.mean[:, None] @ up)[:, 0]


def basis_of(fitted: Fitted, side: Side) -> Basis:
    up = fitted[f"{side}_up"]
    return fitted.get(f"{side}_down", up.transpose(1, 2)), up, fitted[f"{side}_mean"]
