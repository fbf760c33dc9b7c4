"""Attention of a few new tokens to stored pages, as one operation: what the fused kernels must agree with.

Unpack a page, rebuild its keys where a basis says how, turn them by RoPE, score, softmax, weighted sum of the values'
latents. All query heads of a KV head are rows ("x" is query heads per KV head times new tokens). The kernels never hold
more than a tile of any of it; this definition holds the whole block.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels.attention import finish, fold, start
from kvshrink.kernels.latents import Packed, load
from kvshrink.kernels.records import Records
from kvshrink.kernels.rope import rotate
from kvshrink.shapes import Bool, Float, Int, UInt8


@dataclass(frozen=True, eq=False)
class Basis:
    """Keys from latents: z @ up + mean, for G groups of KV heads of a = heads * d channels. Never changed in place.

    prepared: what a kernel has made of it for its own use, kept as long as the basis.
    """

    up: Float[Tensor, "G r a"]
    mean: Float[Tensor, "G a"]
    prepared: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Basis, (self.up, self.mean)  # what is prepared means nothing to another process


class Turn(NamedTuple):
    """RoPE of rebuilt keys. A negative position is a pad, which `visible` hides; it may be turned by anything."""

    positions: Int[Tensor, "#b t"]
    inv_freq: Float[Tensor, " f"]
    scaling: float
    interleaved: bool


class Constant(NamedTuple):
    """A part of all keys before RoPE that is not stored with them. What it adds to a score follows from the position.

    query: as attention uses it, scaled, where `decode`'s was taken to the latents. turn: None: keys are not turned.
    """

    query: Float[Tensor, "b h x d"]
    part: Float[Tensor, "h d"]
    turn: Turn | None


class Live(NamedTuple):
    """Which slots of the pages hold tokens to be read. A page that a lane does not have holds none.

    counts: slots of each page that are filled, from its first on; None: all. L lanes a row, of neighbouring heads.
    skips:  the first slots of each row, all pages' in a row, that are not read; None: none.
    """

    counts: UInt8[Tensor, "b L p"] | None = None
    skips: Int[Tensor, " b"] | None = None

    def seen(self, keys: Packed) -> Bool[Tensor, "b L 1 t"] | None:
        """The same as visibility of slots."""
        counts, there = self.counts, None
        if isinstance(keys.stored, Records) and bool((keys.stored.addresses == 0).any()):
            own = keys.stored.device_addresses != 0
            counts = own.byte() * keys.page if counts is None else counts * own
        if counts is not None:
            there = (torch.arange(keys.page, device=counts.device) < counts[..., None]).flatten(2)[:, :, None]
        if self.skips is not None:
            tokens = next(iter(keys.stored.values())).shape[1] * keys.page
            past = torch.arange(tokens, device=self.skips.device) >= self.skips[:, None]
            there = past[:, None, None] if there is None else there & past[:, None, None]
        return there


ALL = Live()


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
    """(weighted sum of value latents, log-sum-exp) of these pages. A row that sees nothing gives 0 and -inf.

    query:     scaled, float32: e = d channels, or, without a basis, as wide as the keys' latents.
    basis:     how keys are rebuilt; None: scores are products with the latents.
    precision: the model's dtype. A kernel may round factors of its products to it; sums are float32. Here all is
               float32.
    live:      which slots hold tokens, of which the rows may see those that are `visible`.
    constant:  of keys whose scores are products with the latents: what those lack.
    """
    rows, query = _rows(query, keys, basis, turn, constant)
    there = live.seen(keys)
    if there is not None:
        there = there.repeat_interleave(query.shape[1] // there.shape[1], 1)
        visible = there if visible is None else visible & there
    return finish(fold(start(query, values.width), query, rows, load(values), visible, softcap))


def _rows(
    query: Float[Tensor, "b h x e"], keys: Packed, basis: Basis | None, turn: Turn | None, constant: Constant | None
) -> tuple[Float[Tensor, "b G t n"], Float[Tensor, "b h x n"]]:
    """Keys, and queries whose products with them are scores."""
    latent = load(keys)
    if basis is None:
        rows = latent
    else:
        members = query.shape[1] // basis.up.shape[0]
        flat = latent @ basis.up + basis.mean[:, None]
        rows = flat.unflatten(-1, (members, -1)).transpose(2, 3).flatten(1, 2)
    rows = _turned(rows, turn)
    if constant is not None:
        heads, tokens = query.shape[1], latent.shape[2]
        lacking = constant.part[None, :, None].expand(len(query), -1, tokens, -1)
        every = rows.repeat_interleave(heads // rows.shape[1], 1)
        rows = torch.cat([every, _turned(lacking, constant.turn)], 3)
        query = torch.cat([query, constant.query], 3)
    return rows, query


def _turned(rows: Float[Tensor, "b h t d"], turn: Turn | None) -> Float[Tensor, "b h t d"]:
    """Keys before RoPE as attention uses them."""
    if turn is None:
        return rows
    angles = turn.positions[..., None].to(turn.inv_freq.dtype) * turn.inv_freq
    cos, sin = angles.cos() * turn.scaling, angles.sin() * turn.scaling
    return rotate(rows, cos, sin, turn.interleaved, inverse=False)
