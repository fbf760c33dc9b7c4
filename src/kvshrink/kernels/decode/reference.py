"""Attention of a few new tokens to stored pages, as one operation: what the fused kernels must agree with.

Unpack a page, rebuild its keys where a basis says how, turn them by RoPE, score, softmax, weighted sum of the values'
latents. All query heads of a KV head are rows ("x" is query heads per KV head times new tokens). The kernels never hold
more than a tile of any of it; this definition holds the whole block.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels.attention import finish, fold, start
from kvshrink.kernels.latents import Packed, load
from kvshrink.kernels.rope import rotate
from kvshrink.shapes import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class Basis:
    """Keys from latents: z @ up + mean, for G groups of KV heads of a = heads * d channels. Never changed in place.

    prepared: what a kernel has made of it for its own use, kept as long as the basis.
    """

    up: Float[Tensor, "G r a"]
    mean: Float[Tensor, "G a"]
    prepared: dict = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple:
        return Basis, (self.up, self.mean)  # what is prepared means nothing to another process


class Turn(NamedTuple):
    """RoPE of rebuilt keys. A negative position is a pad, which `visible` hides; it may be turned by anything."""

    positions: Int[Tensor, "#b t"]
    inv_freq: Float[Tensor, " f"]
    scaling: float
    interleaved: bool


def decode(
    query: Float[Tensor, "b h x e"],
    keys: Packed,
    basis: Basis | None,
    turn: Turn | None,
    values: Packed,
    visible: Bool[Tensor, "#b #h #x t"] | None,
    softcap: float | None,
    precision: torch.dtype,
) -> tuple[Float[Tensor, "b h x r"], Float[Tensor, "b h x 1"]]:
    """(weighted sum of value latents, log-sum-exp) of these pages. A row that sees nothing gives 0 and -inf.

    query:     scaled, float32: e = d channels, or, without a basis, as wide as the keys' latents.
    basis:     how keys are rebuilt; None: scores are products with the latents.
    precision: the model's dtype. A kernel may round factors of its products to it; sums are float32. Here all is
               float32.
    """
    latent = load(keys)
    if basis is None:
        rows = latent
    else:
        members = query.shape[1] // basis.up.shape[0]
        flat = latent @ basis.up + basis.mean[:, None]
        rows = flat.unflatten(-1, (members, -1)).transpose(2, 3).flatten(1, 2)
    if turn is not None:
        angles = turn.positions[..., None].to(turn.inv_freq.dtype) * turn.inv_freq
        cos, sin = angles.cos() * turn.scaling, angles.sin() * turn.scaling
        rows = rotate(rows, cos, sin, turn.interleaved, inverse=False)
    return finish(fold(start(query, values.width), query, rows, load(values), visible, softcap))
