"""A page whose channels have different widths: runs of channels of one width, packed one after the other.

Latents come in whitened (each channel has variance 1 on the calibration text) and are stored as Lloyd-Max codes of a
unit normal, or as trellis codes of it; the only metadata is one float16 gain per page and group of channels, which
follows text with larger or smaller activations than the calibration's: 16 bits for 32 tokens x 16 channels, .03 bits a
number.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.kernels.groups import runs_of
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.load import load
from kvshrink.kernels.mixed import encode
from kvshrink.kernels.pack import packed_bytes
from kvshrink.methods._packing.base import Importance, Packing, Stored, paged, there
from kvshrink.shapes import Bool, Float

GAIN_BYTES = 2
GROUP = 16  # channels that share a width and a gain


@final
@dataclass(frozen=True)
class Mixed(Packing):
    """sizes: channels of each group, alike but for a smaller last one; bits: their width, 1 or more.

    form: what codes of up to 4 bits are, as kernels/latents names it.
    alike: whether a method gives all channels the same bits, so that a basis alone says what a low rank loses.
    bases: how many groups of KV heads have latents of their own, all at these widths.
    """

    sizes: tuple[int, ...]
    bits: tuple[int, ...]
    page: int
    bases: int = 1
    form: Literal["normal", "trellis"] = "normal"
    alike: bool = False
    metadata: ClassVar[frozenset[str]] = frozenset({"gain"})

    @property
    def groups(self) -> int:
        return self.bases

    @property
    def width(self) -> int:
        return sum(self.sizes)

    def runs(self) -> list[tuple[int, slice]]:
        """(bits, channels) of neighbouring groups of one width."""
        return runs_of(self.sizes, self.bits)

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        pages, real = paged(latent, self.page), there(valid, self.page)
        if real is not None:
            pages = pages.masked_fill(~real, 0.0)
        count = pages.new_full(pages.shape[:2], self.page) if real is None else real.sum((2, 3, 4)).clamp_min(1).float()
        codes, gain = encode(pages, count, self.sizes, self.bits, self.form)
        if not bool(gain.isfinite().all()):
            raise DataError(
                "keys or values are NaN, infinite or thousands of times what they were on the calibration text. "
                "Check the model's activations, or fit on text like this."
            )
        return {"codes": codes, "gain": gain}

    def packed(self, stored: Stored) -> Packed:
        runs = tuple((bits, part.stop - part.start) for bits, part in self.runs())
        return Packed(self.form, stored, self.width, self.page, runs, self.sizes[0] if self.sizes else 1)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return load(self.packed(stored))

    def page_bytes(self) -> int:
        own = sum(group_bytes(size, bits, self.page) for size, bits in zip(self.sizes, self.bits, strict=True))
        return self.bases * own


def group_sizes(channels: int) -> tuple[int, ...]:
    """Channels of each group: GROUP, and what is left over."""
    return (GROUP,) * (channels // GROUP) + ((channels % GROUP,) if channels % GROUP else ())


def group_bytes(size: int, bits: int, page: int) -> int:
    """Bytes of a page of one group: codes and gain; nothing at width 0."""
    return packed_bytes(page * size, bits) + GAIN_BYTES if bits else 0
