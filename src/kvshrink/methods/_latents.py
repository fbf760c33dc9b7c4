"""How rows of numbers lie in a page: as they are, or as affine codes of 1-8 bits. Shared by all codecs.

Input and output are latents [b, G, t, r] of whole pages; what is stored is [b, p, ...]. A page's codes are packed as
one run of page * r codes, so that any r packs without a gap.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.kernels.affine import dequantize, quantize
from kvshrink.kernels.latents import Packed, load
from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.methods._roles import Stored
from kvshrink.shapes import Bool, Float, Int

SIDE_BYTES = 4  # float16 scale and float16 low


@dataclass(frozen=True)
class Raw:
    """Latents stored as floats of `dtype`."""

    groups: int
    width: int
    page: int
    dtype: torch.dtype
    side: ClassVar[frozenset[str]] = frozenset()

    def store(self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        if valid is not None:
            latent = latent.masked_fill(~valid[:, None, :, None], 0.0)
        data = latent.to(self.dtype)
        if not bool(data.isfinite().all()):
            raise DataError(f"keys or values are NaN or beyond {self.dtype}'s range. Check the model's activations.")
        # a copy even where none is needed for the layout: a view would keep the model's whole tensor alive
        pages = data.unflatten(2, (-1, self.page)).transpose(1, 2)
        return {"latent": pages.clone(memory_format=torch.contiguous_format)}

    def packed(self, stored: Stored) -> Packed:
        return Packed("raw", stored, self.width, self.page)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return load(self.packed(stored))

    def lead(self, stored: Stored, width: int) -> Float[Tensor, "b G t w"]:
        """The first `width` channels, the others unread."""
        return stored["latent"][..., :width].transpose(1, 2).flatten(2, 3).float()

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """Some tokens of each row, the others unread."""
        row, page, slot = _places(tokens, self.page)
        return stored["latent"][row, page, :, slot].transpose(1, 2).float()

    def page_bytes(self) -> int:
        return self.page * self.groups * self.width * self.dtype.itemsize

    def fake(self, latent: Float[Tensor, "b G t r"]) -> Float[Tensor, "b G t r"]:
        """What `load(store(latent))` would give, with a gradient: nothing is lost."""
        return latent


@dataclass(frozen=True)
class Affine:
    """Latents as `bits`-bit codes; one scale per channel and page (axis "channel") or per token and `group`."""

    groups: int
    width: int
    page: int
    bits: int
    axis: Literal["channel", "token"]
    group: int = 64
    side: ClassVar[frozenset[str]] = frozenset({"scale", "low"})

    @property
    def per_token(self) -> int:
        """Scales per token (axis "token")."""
        return -(-self.width // self.group)

    def store(self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        codes, scale, low = quantize(self._grouped(latent), self.bits, self._grouped_valid(valid, latent))
        flat = self._ungrouped(codes).flatten(3)  # [b, p, G, page * r]
        return {"codes": pack(flat, self.bits), "scale": scale.squeeze(-1), "low": low.squeeze(-1)}

    def packed(self, stored: Stored) -> Packed:
        return Packed(self.axis, stored, self.width, self.page, ((self.bits, self.width),), self.group)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return load(self.packed(stored))

    def lead(self, stored: Stored, width: int) -> Float[Tensor, "b G t w"]:
        """The first `width` channels; the others are not unpacked, but at 3 bits, where a code lies in two bytes."""
        if self.bits == 3:
            codes = unpack(stored["codes"], 3).unflatten(-1, (self.page, self.width))[..., :width]
        else:
            codes = unpack(self._lanes(stored)[..., :width].flatten(-2), self.bits).unflatten(-1, (self.page, width))
        scale, low = stored["scale"], stored["low"]
        if self.axis == "channel":
            rows = dequantize(codes, scale[:, :, :, None, :width], low[:, :, :, None, :width])
        else:
            rows = dequantize(codes, self._spread(scale, width), self._spread(low, width))
        return rows.transpose(1, 2).flatten(2, 3)

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """Some tokens of each row; the others are not unpacked, but at 3 bits."""
        row, page, slot = _places(tokens, self.page)
        if self.bits == 3:
            codes = unpack(stored["codes"], 3).unflatten(-1, (self.page, self.width))[row, page, :, slot]
        else:
            lanes = self._lanes(stored)
            shift = (slot // lanes.shape[3] * self.bits).to(torch.uint8)[:, :, None, None]
            codes = (lanes[row, page, :, slot % lanes.shape[3]] >> shift) & (2**self.bits - 1)
        if self.axis == "channel":
            rows = dequantize(codes, stored["scale"][row, page], stored["low"][row, page])
        else:
            scale, low = (self._spread(stored[name][row, page, :, slot], self.width) for name in ("scale", "low"))
            rows = dequantize(codes, scale, low)
        return rows.transpose(1, 2)

    def page_bytes(self) -> int:
        scales = self.width if self.axis == "channel" else self.page * self.per_token
        return self.groups * (packed_bytes(self.page * self.width, self.bits) + scales * SIDE_BYTES)

    def fake(self, latent: Float[Tensor, "b G t r"]) -> Float[Tensor, "b G t r"]:
        """What `load(store(latent))` would give, with a straight-through gradient (for quantisation-aware training)."""
        with torch.no_grad():
            codes, scale, low = quantize(self._grouped(latent), self.bits)
            rounded = self._ungrouped(dequantize(codes, scale, low)).transpose(1, 2).flatten(2, 3)
        return latent + (rounded - latent).detach()

    def _grouped(self, latent: Tensor) -> Tensor:
        """[b, p, G, r, page] for axis "channel", [b, p, G, page, scales, group] for "token": groups last."""
        pages = latent.unflatten(2, (-1, self.page)).transpose(1, 2)
        if self.axis == "channel":
            return pages.transpose(-1, -2)
        # a ragged last group is filled with copies of the last channel, which change neither minimum nor maximum
        spare = self.per_token * self.group - self.width
        if spare:
            pages = torch.cat([pages, pages[..., -1:].expand(*pages.shape[:-1], spare)], -1)
        return pages.unflatten(-1, (self.per_token, self.group))

    def _ungrouped(self, x: Tensor) -> Tensor:
        """[b, p, G, page, r] again."""
        return x.transpose(-1, -2) if self.axis == "channel" else x.flatten(-2)[..., : self.width]

    def _grouped_valid(self, valid: Tensor | None, latent: Tensor) -> Tensor | None:
        if valid is None:
            return None
        return self._grouped(valid[:, None, :, None].expand(latent.shape))

    def _spread(self, side: Tensor, width: int) -> Tensor:
        return side.repeat_interleave(self.group, -1)[..., :width]

    def _lanes(self, stored: Stored) -> Tensor:
        """[b, p, G, m, r]: as planes of m * r codes are packed, lane i holds the tokens i, i + m, i + 2m, ..."""
        return stored["codes"].unflatten(-1, (self.page * self.bits // 8, self.width))


def _places(tokens: Int[Tensor, "b k"], page: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, page, slot in it) of each token."""
    return torch.arange(len(tokens), device=tokens.device)[:, None], tokens // page, tokens % page


def packing(
    groups: int, width: int, page: int, bits: int | None, axis: str, group: int, dtype: torch.dtype
) -> Raw | Affine:
    """Raw for bits=None, else Affine."""
    if bits is None:
        return Raw(groups, width, page, dtype)
    return Affine(groups, width, page, bits, "channel" if axis == "channel" else "token", min(group, width))
