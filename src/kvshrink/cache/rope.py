"""The rotation of one layer's keys: frequencies and layout, enough to apply RoPE at any position and undo it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvshrink.kernels.rope import rotate
from kvshrink.methods._codec import Codec
from kvshrink.shapes import Float, Int


@dataclass(frozen=True, eq=False)
class Rope:
    """inv_freq: angle per position of each channel pair, [f]. scaling: YaRN's factor on cos and sin."""

    inv_freq: Tensor
    scaling: float
    interleaved: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rope":
        return self

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Channels that are rotated together: (first, second) of each pair, by frequency."""
        f = torch.arange(len(self.inv_freq))
        return (2 * f, 2 * f + 1) if self.interleaved else (f, f + len(f))

    def cos_sin(self, positions: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t f"], Float[Tensor, "b t f"]]:
        """Cosine and sine at positions, float32. A pad's position -1 is as good as any."""
        angles = positions[..., None].float() * self.inv_freq
        if self.scaling == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def apply(self, keys: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b h t d"]:
        """Keys as attention uses them, from keys before RoPE."""
        return rotate(keys, *self.cos_sin(positions), self.interleaved, inverse=False)

    def undo(self, keys: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b h t d"]:
        """Keys before RoPE, from keys as attention uses them."""
        return rotate(keys, *self.cos_sin(positions), self.interleaved, inverse=True)


def as_stored(
    codec: Codec, keys: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"], rope: Rope | None
) -> Float[Tensor, "b h t d"]:
    """Keys as a codec stores them, from keys as attention uses them."""
    if rope is not None and codec.site == "k_pre":
        return rope.undo(keys, positions)
    return keys if codec.constant is None else keys - turned(codec.constant, keys.shape, positions, rope)


def as_used(
    codec: Codec, keys: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"], rope: Rope | None
) -> Float[Tensor, "b h t d"]:
    """The other way."""
    if rope is not None and codec.site == "k_pre":
        return rope.apply(keys, positions)
    return keys if codec.constant is None else keys + turned(codec.constant, keys.shape, positions, rope)


def turned(
    constant: Float[Tensor, "h d"], shape: Sequence[int], positions: Int[Tensor, "b t"], rope: Rope | None
) -> Float[Tensor, "b h t d"]:
    """A part that all keys have before RoPE, as it is at these positions."""
    every = constant[:, None].expand(*shape)
    return every if rope is None else rope.apply(every, positions)
