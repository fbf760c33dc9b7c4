"""Affine codes of 8 bits in nested planes of 2, 2 and 4 bits, the highest first: x = (code + middle) x scale + low.

Dropping the last plane leaves code >> 4, dropping the next one code >> 6, exactly: a page grows coarser without being
quantised again. A code of fewer bits reads as the middle of the 8-bit numbers that share it, (2^dropped - 1) / 2 above
the lowest; scale and low stay what they were.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from kvshrink.kernels.affine import quantize
from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.methods._packing.base import METADATA_BYTES, Importance, Packing, Stored
from kvshrink.methods._packing.grouping import Grouping
from kvshrink.shapes import Bool, Float

PLANES = {"top": 2, "next": 2, "rest": 4}  # bits of each, the highest bits of a code first
KEPT = {8: ("top", "next", "rest"), 4: ("top", "next"), 2: ("top",)}  # by the bits that are left


@final
@dataclass(frozen=True)
class Planes(Packing):
    """8-bit codes of which the `bits` highest are held: 8, 4 or 2. Groups as `Affine` has them."""

    groups: int
    width: int
    page: int
    bits: int
    axis: Literal["channel", "token"]
    group: int = 64
    metadata: ClassVar[frozenset[str]] = frozenset({"scale", "low"})

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.axis, self.width, self.page, self.group)

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        grouping = self.grouping
        rows = grouping.split(latent)
        codes, scale, low = quantize(rows, 8, grouping.real(valid, rows))
        flat = grouping.pages(codes).flatten(3)  # [b, p, G, page * r]
        stored, shift = {"scale": scale.squeeze(-1), "low": low.squeeze(-1)}, 8
        for name in KEPT[self.bits]:
            shift -= PLANES[name]
            stored[name] = pack((flat >> shift) & (2 ** PLANES[name] - 1), PLANES[name])
        return stored

    def truncate(self, stored: Stored) -> Stored:
        return {name: stored[name] for name in ("scale", "low", *KEPT[self.bits])}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        codes, shift = None, 8
        for name in KEPT[self.bits]:
            shift -= PLANES[name]
            plane = unpack(stored[name], PLANES[name]) << shift
            codes = plane if codes is None else codes.bitwise_or_(plane)
        assert codes is not None
        pages = codes.float().add_((2**shift - 1) / 2).unflatten(-1, (self.page, self.width))
        scale, low = (self.grouping.spread(stored[name]).float() for name in ("scale", "low"))
        found: Tensor = pages.mul_(scale).add_(low).transpose(1, 2).flatten(2, 3)
        return found

    def page_bytes(self) -> int:
        codes = sum(packed_bytes(self.page * self.width, PLANES[name]) for name in KEPT[self.bits])
        return self.groups * (codes + self.grouping.groups * METADATA_BYTES)
