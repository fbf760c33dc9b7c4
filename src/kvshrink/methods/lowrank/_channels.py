"""Key channels that are not stored: the identity-basis case of a low rank, where a rotation by RoPE is no obstacle.

A channel that is left out reads as `fill`. RoPE rotates channels in pairs, so a pair is kept or left out as one:
pruning then commutes with RoPE. What leaving a channel out costs is known in closed form: the score q . k changes by
q_c (k_c - fill_c), whose mean square over queries at all distances is query energy x energy of what is lost. Channels
of all heads lie in one row of a page, so that heads may keep different numbers of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._packing import Affine, Raw, packing
from kvshrink.methods._packing.base import Importance
from kvshrink.methods._roles import Codec, Fitted, Stored
from kvshrink.methods._settings import BITS, require
from kvshrink.methods._stats import CalibrationStats, LayerShape
from kvshrink.shapes import Bool, Float, Int

GROUP = 32  # channels of a head that share a value's scale, as in KIVI (arXiv 2402.02750)

Fill = Literal["mean", "zero"]
Channel = TypeVar("Channel")


@final
@dataclass(frozen=True, eq=False)
class ChannelCodec(PackedCodec):
    """Keys of all heads with the channels `kept` (head * d + channel, ascending); the others read as `fill`.

    Keys are never summed over tokens, so there is one group of heads and `expand` takes H = G = 1.
    """

    site: Literal["k_pre", "k_post"]
    kept: Int[Tensor, " r"]
    fill: Float[Tensor, " n"]
    packing: Raw | Affine

    def to(self, device: torch.device) -> "ChannelCodec":
        return replace(self, kept=self.kept.to(device), fill=self.fill.to(device))

    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        flat = rows.transpose(1, 2).flatten(2)  # [b, t, n]
        sound = flat.isfinite().all(-1) if valid is None else flat.isfinite().all(-1) | ~valid
        kept = flat.index_select(-1, self.kept)
        # a key that is broken in a channel left out is as broken, and would pass unseen
        return self.packing.store(kept.masked_fill(~sound[..., None], torch.nan)[:, None], valid)

    def packed(self, stored: Stored) -> None:
        """No fused kernel fills in the channels that are left out."""

    def expand(self, latent: Float[Tensor, "b 1 t r"], heads: int) -> Float[Tensor, "b h t d"]:
        flat = self.fill.repeat(*latent.shape[::2], 1).index_copy_(2, self.kept, latent[:, 0])
        found: Tensor = flat.unflatten(-1, (heads, -1)).transpose(1, 2)
        return found


def check(keep: float, bits: int | None) -> None:
    """Raise SettingError on settings that no model could use."""
    require(0 < keep <= 1, f"keep={keep}", "Use a share of key channels above 0, up to 1.")
    require(bits is None or bits in BITS, f"bits={bits}", f"Use None or one of {BITS}.")


def count(keep: float, channels: int) -> int:
    """Channels kept of so many, in pairs, rounded down. Raises SettingError if that is none."""
    kept = channels if keep == 1 else 2 * int(keep * channels / 2 + 1e-6)
    if kept == 0:
        raise SettingError(f"keep={keep} keeps no pair of {channels} channels. Use keep of at least {2 / channels:g}.")
    return kept


def packings(shape: LayerShape, kept: int, page: int, bits: int | None) -> tuple[Raw | Affine, Raw | Affine]:
    """Of `kept` key channels of a layer, and of its values: keys per channel over a page, values per token."""
    keys = packing(1, kept, page, bits, "channel", GROUP, shape.dtype)
    return keys, packing(shape.heads, shape.head_dim, page, bits, "token", GROUP, shape.dtype)


def codecs(shape: LayerShape, fitted: Fitted, page: int, bits: int | None, fill: Fill) -> tuple[Codec, Codec]:
    """Zeros are zeros after any rotation, so RoPE of those keys need not be undone; a mean is one before RoPE."""
    kept, means = fitted["key_kept"], fitted["key_fill"]
    keys, values = packings(shape, len(kept), page, bits)
    return ChannelCodec("k_post" if fill == "zero" else "k_pre", kept, means, keys), HeadwiseCodec("v", values)


def importance(stats: CalibrationStats, fill: Fill, queries: bool = True) -> Float[Tensor, " n"]:
    """Mean squared error of the scores without each channel. queries=False: of the keys alone."""
    lost = stats.key.covariance.diagonal().double()
    if fill == "zero":
        lost = lost + stats.key.mean.double().square()
    lost = (lost + lost[partners(stats)]) / 2
    return lost * stats.known("query_energy").double().flatten() if queries else lost


def partners(stats: CalibrationStats) -> Int[Tensor, " n"]:
    """The channel that RoPE rotates each channel with, or itself."""
    h, d = stats.shape.heads, stats.shape.head_dim
    other = torch.arange(d)
    if stats.pairs is not None:
        first, second = stats.pairs
        other[first], other[second] = second, first
    return (torch.arange(h)[:, None] * d + other).flatten().to(stats.key.mean.device)


def units(
    worths: Iterable[float], partner: Iterable[int], names: Sequence[Channel]
) -> list[tuple[float, list[Channel]]]:
    """(importance of one channel, channels) of what stands or falls together."""
    both = enumerate(zip(worths, partner, strict=True))
    return [(w, [names[c]] if c == p else [names[c], names[p]]) for c, (w, p) in both if c <= p]


def best(units: Iterable[tuple[float, list[Channel]]], room: int) -> list[Channel]:
    """Channels of the most important units, as many as there is room for."""
    kept: list[Channel] = []
    for _, channels in sorted(units, key=lambda unit: -unit[0]):
        if len(kept) + len(channels) <= room:
            kept += channels
    return kept


def fills(stats: CalibrationStats, fill: Fill) -> Float[Tensor, " n"]:
    """What a channel reads as that is left out."""
    mean = stats.key.mean.float().contiguous()
    return mean if fill == "mean" else torch.zeros_like(mean)
