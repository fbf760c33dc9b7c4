"""A codec that stores what it makes of rows by a packing: what all of these have from it."""

from typing import TYPE_CHECKING

from torch import Tensor

from kvshrink.kernels.latents import Packed
from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.base import Importance
from kvshrink.methods._roles import Codec, Stored
from kvshrink.shapes import Bool, Float, Int


class PackedCodec(Codec):
    """`project` says what is stored of rows; `expand` is the codec's own."""

    if TYPE_CHECKING:  # read only, so that it may be a field of a dataclass, or a property

        @property
        def packing(self) -> Packing: ...

    else:
        packing: Packing

    def project(self, rows: Float[Tensor, "b h t d"]) -> Float[Tensor, "b G t r"]:
        return rows

    @property
    def metadata(self) -> frozenset[str]:
        return self.packing.metadata

    @property
    def width(self) -> int:
        return self.packing.width

    @property
    def needs_importance(self) -> bool:
        return self.packing.needs_importance

    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        return self.packing.store(self.project(rows), valid, importance)

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.packing.load(stored)

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        return self.packing.pick(stored, tokens)

    def packed(self, stored: Stored) -> Packed | None:
        return self.packing.packed(stored)

    def sound(self, stored: Stored) -> bool:
        return self.packing.sound(stored)

    def truncate(self, stored: Stored) -> Stored:
        return self.packing.truncate(stored)

    def page_bytes(self) -> int:
        return self.packing.page_bytes()
