"""Runs of channels, each of its own width, with one scale a token and run: Lloyd-Max codes of a unit normal."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.kernels.nearest import nearest
from kvshrink.kernels.normal.reference import levels
from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.methods._packing.base import Importance, Packing, Stored, checked, joined, paged, there
from kvshrink.shapes import Bool, Float

WIDTHS = (1, 2, 3, 4)  # bits


@final
@dataclass(frozen=True)
class Blocks(Packing):
    """sizes: channels at each of WIDTHS, in this order. Where there are none a scale is stored all the same, so that
    bytes do not depend on what was learnt."""

    sizes: tuple[int, ...]
    page: int
    groups: ClassVar[int] = 1
    metadata: ClassVar[frozenset[str]] = frozenset({"scale"})

    @property
    def width(self) -> int:
        return sum(self.sizes)

    def store(
        self, latent: Float[Tensor, "b 1 t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        pages, real = paged(latent, self.page), there(valid, self.page)
        if real is not None:
            pages = pages.masked_fill(~real, 0.0)
        runs = pages.split(self.sizes, -1)
        sizes = [run.square().mean(-1).sqrt() if run.shape[-1] else run.sum(-1) for run in runs]
        scale = checked(torch.stack(sizes, -1).to(torch.float16))  # [b, p, 1, page, runs]
        codes = []
        for bits, run, own in zip(WIDTHS, runs, scale.float().unbind(-1), strict=True):
            unit = run / own.where(own > 0, 1.0)[..., None]
            codes.append(pack(nearest(unit, levels(bits).float()).flatten(3), bits))
        return {"codes": torch.cat(codes, -1), "scale": scale}

    def load(self, stored: Stored) -> Float[Tensor, "b 1 t r"]:
        codes = stored["codes"].split(self._bytes(), -1)
        runs = []
        for bits, size, packed, own in zip(WIDTHS, self.sizes, codes, stored["scale"].float().unbind(-1), strict=True):
            table = levels(bits).float().to(packed.device)
            runs.append(table[unpack(packed, bits).int()].unflatten(-1, (self.page, size)) * own[..., None])
        return joined(torch.cat(runs, -1))

    def page_bytes(self) -> int:
        return sum(self._bytes()) + 2 * len(WIDTHS) * self.page

    def _bytes(self) -> list[int]:
        """Bytes of a page's codes at each width."""
        return [packed_bytes(self.page * size, bits) for bits, size in zip(WIDTHS, self.sizes, strict=True)]
