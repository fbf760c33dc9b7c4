"""GEAR: few bits, the error of a page as two thin matrices, and outliers as they are. arXiv 2403.05527

X = Q + L + S. S: half of `outliers` of the numbers of each vector from its top, half from its bottom, in float16 (of
keys a channel over a page's tokens, of values a token over its channels). Q: what stays, in `bits` bits, as KIVI (keys
per channel and 64 tokens, values per token and 64 channels) or as KCVT (keys per channel over the page, values per
token over the head). L: the error of Q, rank `rank` for each page and KV head. GEAR-L is outliers=0.0.

Departures: every page of 128 tokens has its own L, of one rank, where the paper takes rank 4 for a whole prompt and 2
for each 64 decoded tokens: 3 by default, which with a page's 128 + 128 numbers a component costs 3.625 bits a number at
2 bits and 128 channels, the paper's 3.66 at 4096 tokens. A shorter page (latents are in pages of 32) gets its share of
the rank, at least 1. Outliers are counted per page, not per prompt: shares are rounded to whole numbers of a vector, so
that 2 % of 128 is one at each end, and of few channels none. They are replaced by the mean of what stays, and L is
added before they are put back. The page is rebuilt with L, block by block; the paper multiplies queries by its factors.
Between `window` and window + 128 recent tokens are exact; the paper's buffer has up to 64. 3 bits are ours.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from kvshrink.methods._packing import Affine, Packing
from kvshrink.methods._packing.parts import Parts
from kvshrink.methods._packing.residual import Residual
from kvshrink.methods._packing.sparse import sparse
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

BITS = (2, 3, 4)
GROUP = 64


@final
@dataclass(frozen=True)
class GEAR(Quantiser):
    """`bits`-bit codes, an error of rank `rank`, a share `outliers` of all numbers in float16; no sinks."""

    sinks: int = 0
    bits: int = 2
    rank: int = 3
    outliers: float = 0.02
    base: Literal["kivi", "kcvt"] = "kivi"

    page: ClassVar[int] = 128
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def check(self) -> None:
        super().check()
        require(0 <= self.rank <= self.page, f"rank={self.rank}", f"Use 0 (no low-rank error) to {self.page}.")
        require(0 <= self.outliers <= 0.5, f"outliers={self.outliers}", "Use a share from 0 (none) to 0.5.")

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        codes = self._key_codes(space) if kv == "key" else self._value_codes(space)
        rank = min(max(1, round(self.rank * space.page / self.page)), space.width) if self.rank else 0
        near = Residual(codes, rank) if rank else codes
        return sparse(near, "channel" if kv == "key" else "token", self.outliers, "ends")

    def _key_codes(self, space: Space) -> Packing:
        if self.base == "kcvt" or space.page <= GROUP:
            return Affine(space.groups, space.width, space.page, self.bits, "channel")
        return Parts(Affine(space.groups, space.width, GROUP, self.bits, "channel"), space.page // GROUP)

    def _value_codes(self, space: Space) -> Packing:
        group = min(GROUP, space.width) if self.base == "kivi" else space.width
        return Affine(space.groups, space.width, space.page, self.bits, "token", group)


METHOD = GEAR
