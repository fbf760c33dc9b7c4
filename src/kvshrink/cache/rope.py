"""The rotation of one layer's keys: frequencies and layout, enough to apply RoPE at any position and undo it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import CacheError
from kvshrink.kernels.rope import rotate
from kvshrink.methods._codec import Codec
from kvshrink.shapes import Float, Int

FAR = 2**30  # added to a position that was turned by a longrope's other frequencies; contexts end long before


@dataclass(frozen=True, eq=False)
class Rope:
    """inv_freq: angle per position of each channel pair, [f]. scaling: YaRN's factor on cos and sin.

    long: frequencies of steps that reach beyond `most` tokens (longrope: Phi-3, Phi-4); None: they are always the same.
    Keys stay as their step turned them, so such a step's positions are marked, by FAR, wherever they are kept.
    """

    inv_freq: Tensor
    scaling: float
    interleaved: bool
    long: Tensor | None = None
    most: int = 0

    def to(self, device: torch.device) -> "Rope":
        if self.inv_freq.device == device:
            return self
        return replace(
            self, inv_freq=self.inv_freq.to(device), long=None if self.long is None else self.long.to(device)
        )

    def marked(self, positions: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
        """Positions of one step, as they are kept."""
        reach = 0 if self.long is None or not positions.numel() else int(positions.max()) + 1
        if reach > FAR:
            raise CacheError(f"position_ids reach {reach - 1}. With longrope only 0 to {FAR - 1} can be stored.")
        return self.of_prompt(positions, reach)

    def of_prompt(self, positions: Int[Tensor, "b t"], reach: int | Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """The same of a prompt of so many tokens, which is one step."""
        if self.long is None:
            return positions
        far = reach > self.most
        return torch.where(far, positions + FAR, positions) if isinstance(far, Tensor) else positions + FAR * far

    def alike(self, positions: Int[Tensor, "b t"]) -> tuple[Int[Tensor, "b t"], Float[Tensor, " f"]] | None:
        """Plain positions and the frequencies of all of them; None if they have both."""
        if self.long is None:
            return positions, self.inv_freq
        far = positions >= FAR
        if not bool(far.any()):
            return positions, self.inv_freq
        return (positions - FAR, self.long) if bool((far | (positions < 0)).all()) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rope":
        return self

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Channels that are rotated together: (first, second) of each pair, by frequency."""
        f = torch.arange(len(self.inv_freq))
        return (2 * f, 2 * f + 1) if self.interleaved else (f, f + len(f))

    def cos_sin(self, positions: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t f"], Float[Tensor, "b t f"]]:
        """Cosine and sine at positions, float32. A pad's position -1 is as good as any."""
        if self.long is None:
            angles = positions[..., None].float() * self.inv_freq
        else:
            frequencies = torch.where((positions >= FAR)[..., None], self.long, self.inv_freq)
            angles = plain(positions)[..., None].float() * frequencies
        if self.scaling == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def apply(self, keys: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b h t d"]:
        """Keys as attention uses them, from keys before RoPE."""
        return rotate(keys, *self.cos_sin(positions), self.interleaved, inverse=False)

    def undo(self, keys: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b h t d"]:
        """Keys before RoPE, from keys as attention uses them."""
        return rotate(keys, *self.cos_sin(positions), self.interleaved, inverse=True)


def plain(positions: Int[Tensor, "*all"]) -> Int[Tensor, "*all"]:
    """Positions without marks."""
    return torch.where(positions >= FAR, positions - FAR, positions)


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
