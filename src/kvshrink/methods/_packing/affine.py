"""Numbers as affine codes of 1-8 bits: code x scale + low.

A page's codes are packed as one run of page * r codes, so that any r packs without a gap.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.affine import dequantize, quantize
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.load import load
from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.methods._packing.base import Importance, MovesSlots, Packing, Stored, slots_of
from kvshrink.methods._packing.grouping import Grouping
from kvshrink.methods._packing.raw import Raw
from kvshrink.shapes import Bool, Float, Int

DTYPES = {"float16": torch.float16, "float8": torch.float8_e4m3fn}


@final
@dataclass(frozen=True)
class Affine(Packing, MovesSlots):
    """Latents as `bits`-bit codes; one scale per channel and page (axis "channel") or per token and `group`.

    clip:   share of a group's range that codes cover, about its middle; what lies outside takes the nearest end.
    scales: how scale and low are stored. float8 (e4m3) halves the metadata and ends at 448.
    """

    groups: int
    width: int
    page: int
    bits: int
    axis: Literal["channel", "token"]
    group: int = 64
    clip: float = 1.0
    scales: Literal["float16", "float8"] = "float16"
    metadata: ClassVar[frozenset[str]] = frozenset({"scale", "low"})

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.axis, self.width, self.page, self.group)

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        grouping = self.grouping
        rows = grouping.split(latent)
        codes, scale, low = quantize(rows, self.bits, grouping.real(valid, rows), self.clip, DTYPES[self.scales])
        flat = grouping.pages(codes).flatten(3)  # [b, p, G, page * r]
        return {"codes": pack(flat, self.bits), "scale": _kept(scale), "low": _kept(low)}

    def packed(self, stored: Stored) -> Packed | None:
        return None if self.scales == "float8" else self._packed(stored)

    def _packed(self, stored: Stored) -> Packed:
        return Packed(self.axis, stored, self.width, self.page, ((self.bits, self.width),), self.group)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return load(self._packed(_read(stored)))

    def lead(self, stored: Stored, width: int) -> Float[Tensor, "b G t w"]:
        """The first `width` channels; the others are not unpacked, but at 3 bits, where a code lies in two bytes."""
        stored = _read(stored)
        if self.bits == 3:
            codes = unpack(stored["codes"], 3).unflatten(-1, (self.page, self.width))[..., :width]
        else:
            codes = unpack(self._lanes(stored)[..., :width].flatten(-2), self.bits).unflatten(-1, (self.page, width))
        scale, low = (self.grouping.spread(stored[name])[..., :width] for name in ("scale", "low"))
        return dequantize(codes, scale, low).transpose(1, 2).flatten(2, 3)

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """Some tokens of each row; the others are not unpacked, but at 3 bits."""
        stored = _read(stored)
        row, page, slot = _places(tokens, self.page)
        if self.bits == 3:
            codes = unpack(stored["codes"], 3).unflatten(-1, (self.page, self.width))[row, page, :, slot]
        else:
            lanes = self._lanes(stored)
            places = lanes.shape[3]
            shift = (slot // places * self.bits).to(torch.uint8)[:, :, None, None]
            if self.groups == 1:
                found = _whole(lanes.flatten(1, 3), row, page * places + slot % places)[:, :, None]
            else:
                found = lanes[row, page, :, slot % places]
            codes = (found >> shift) & (2**self.bits - 1)
        if self.axis == "channel":
            rows = dequantize(codes, _whole(stored["scale"], row, page), _whole(stored["low"], row, page))
        else:
            scale, low = (self.grouping.spread(stored[name][row, page, :, slot]) for name in ("scale", "low"))
            rows = dequantize(codes, scale, low)
        return rows.transpose(1, 2)

    @property
    def drops(self) -> frozenset[type]:
        """A scale of a channel is over the tokens of a page."""
        return frozenset({MovesSlots} if self.axis == "channel" else ())

    def moved(self, stored: Stored, index: Int[Tensor, "b G k"]) -> Stored:
        codes = unpack(stored["codes"], self.bits).unflatten(-1, (self.page, self.width))
        numbers = {k: slots_of(stored[k], index) for k in ("scale", "low")}
        return {"codes": pack(slots_of(codes, index).flatten(3), self.bits), **numbers}

    def page_bytes(self) -> int:
        metadata = 2 * DTYPES[self.scales].itemsize
        return self.groups * (packed_bytes(self.page * self.width, self.bits) + self.grouping.groups * metadata)

    def _lanes(self, stored: Stored) -> Tensor:
        """[b, p, G, m, r]: as planes of m * r codes are packed, lane i holds the tokens i, i + m, i + 2m, ..."""
        found: Tensor = stored["codes"].unflatten(-1, (self.page * self.bits // 8, self.width))
        return found


def _kept(metadata: Tensor) -> Tensor:
    """One number a group. 8-bit floats are stored as bytes, which torch can index and join."""
    metadata = metadata.squeeze(-1)
    return metadata.view(torch.uint8) if metadata.dtype.itemsize == 1 else metadata


def _read(stored: Stored) -> Stored:
    """The same with metadata as numbers."""
    if stored["scale"].dtype != torch.uint8:
        return stored
    return {**stored, **{name: stored[name].view(torch.float8_e4m3fn).float() for name in ("scale", "low")}}


def _whole(t: Tensor, row: Tensor, at: Int[Tensor, "b k"]) -> Tensor:
    """t[row, at] [b, k, ...]: copies of whole rows, where torch's index goes number by number."""
    b, n = t.shape[:2]
    found: Tensor = t.flatten(0, 1).index_select(0, (row * n + at).flatten()).unflatten(0, (b, -1))
    return found


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
