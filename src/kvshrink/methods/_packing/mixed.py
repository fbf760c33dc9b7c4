"""A page whose channels have different widths: runs of channels of one width, packed one after the other.

Latents come in whitened (each channel has variance 1 on the calibration text) and are stored as Lloyd-Max codes of a
unit normal, or as trellis codes of it; the only metadata is one float16 gain per page and group of channels, which
follows text with larger or smaller activations than the calibration's: 16 bits for 32 tokens x 16 channels, .03 bits a
number.
"""

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.kernels.latents import Packed, code_of, level_table, load
from kvshrink.kernels.pack import pack, packed_bytes
from kvshrink.methods._packing.base import Importance, Packing, Stored, paged, there
from kvshrink.methods._packing.gains import widened
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
        out, at = [], 0
        for bits, members in groupby(zip(self.bits, self.sizes, strict=True), key=lambda pair: pair[0]):
            count = sum(size for _, size in members)
            out.append((bits, slice(at, at + count)))
            at += count
        return out

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        pages, real = paged(latent, self.page), there(valid, self.page)
        count: Tensor | float = float(self.page)
        if real is not None:
            pages = pages.masked_fill(~real, 0.0)
            count = real.sum(3).clamp_min(1)
        energy = pages.square().sum(3) / count  # [b, p, G, r]
        gain = torch.stack([part.mean(-1) for part in energy.split(self.sizes, -1)], -1) if self.sizes else energy
        gain = widened(pages, gain.sqrt(), self._reach(gain), self.sizes).to(torch.float16)
        if not bool(gain.isfinite().all()):
            raise DataError(
                "keys or values are NaN, infinite or thousands of times what they were on the calibration text. "
                "Check the model's activations, or fit on text like this."
            )
        spread = self._spread(gain)[:, :, :, None]
        unit = pages / torch.where(spread > 0, spread, torch.ones_like(spread))
        codes = [
            pack(code_of(self.form, bits).to_codes(unit[..., part], bits).flatten(3), bits)
            for bits, part in self.runs()
        ]
        return {"codes": torch.cat(codes, -1) if codes else pages.new_zeros(*pages.shape[:3], 0).byte(), "gain": gain}

    def packed(self, stored: Stored) -> Packed:
        runs = tuple((bits, part.stop - part.start) for bits, part in self.runs())
        return Packed(self.form, stored, self.width, self.page, runs, self.sizes[0] if self.sizes else 1)

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return load(self.packed(stored))

    def page_bytes(self) -> int:
        own = sum(group_bytes(size, bits, self.page) for size, bits in zip(self.sizes, self.bits, strict=True))
        return self.bases * own

    def _reach(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`reach` of each group's codes."""
        most, error = like.new_tensor([reach(self.form, bits) for bits in self.bits]).view(-1, 2).unbind(1)
        return most, error

    def _spread(self, gain: Tensor) -> Tensor:
        """[.., groups] to [.., channels], float32."""
        return gain.float().repeat_interleave(torch.tensor(self.sizes, device=gain.device, dtype=torch.long), -1)


@cache
def reach(form: str, bits: int) -> tuple[float, float]:
    """(the largest level of such codes, the expected squared error of a unit normal number)."""
    return float(level_table(form)[bits].abs().max()), float(code_of(form, bits).expected_error(bits))


def group_sizes(channels: int) -> tuple[int, ...]:
    """Channels of each group: GROUP, and what is left over."""
    return (GROUP,) * (channels // GROUP) + ((channels % GROUP,) if channels % GROUP else ())


def group_bytes(size: int, bits: int, page: int) -> int:
    """Bytes of a page of one group: codes and gain; nothing at width 0."""
    return packed_bytes(page * size, bits) + GAIN_BYTES if bits else 0
