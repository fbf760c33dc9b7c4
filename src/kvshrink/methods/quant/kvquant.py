"""KVQuant: keys before RoPE, per channel and static; fitted tables; outliers kept apart. arXiv 2401.18079

Before RoPE a key channel keeps its place and its size from token to token, so its centre and range are measured once,
on calibration text: quantiles, the outermost `outliers` of a channel left out. They fold into a change of basis, and
keys store codes alone. Values have one float16 centre and range a token. The levels are no grid but one table for a
layer's keys and one for its values (nuq), by weighted k-means on the normalised calibration rows. The numbers farthest
out are float16 with a place: of keys `outliers` of each page and head, of values as many of each token and head. At 2
bits decoded numbers are shifted and scaled to have the mean and deviation of the originals (Q-Norm).

Departures: k-means weights are the paper's Fisher information no more, but what an error costs: the expected squared
error of scores (keys) or of the layer's output (values), times the squared range that scales it back. Outliers are
capped, so that bytes are promised: of keys by page, where the paper's thresholds are static and its cap is per token
over all heads; a channel's threshold is then its range, beyond which a number takes the outermost level. Values are
normalised by token and head, the paper's by token over all heads. The calibration's first tokens are not left out of
the fit. The last `window` tokens are exact; the paper has none but the sink.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.normal.reference import levels
from kvshrink.methods._packing import Codebook, Packing
from kvshrink.methods._packing.sparse import Sparse, sparse
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV
from kvshrink.methods.quant._tables import fitted, normed
from kvshrink.shapes import Float

BITS = (2, 3, 4)
NARROWER = 0.01  # of the median range: a channel that hardly moves on the calibration text may do so later
NARROW = 1e-6  # the least range of a channel: one that never changes on the calibration text has none


@final
@dataclass(frozen=True)
class KVQuant(Quantiser):
    """`bits`-bit codes of fitted tables, a share `outliers` of all numbers in float16."""

    sinks: int = 1
    bits: int = 3
    outliers: float = 0.01

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS
    site: ClassVar[Literal["k_pre", "k_post"]] = "k_pre"

    def check(self) -> None:
        super().check()
        require(0 <= self.outliers <= 0.5, f"outliers={self.outliers}", "Use a share from 0 to 0.5.")

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform | None:
        return Transform.scaled(learnt["range"], learnt["middle"]) if kv == "key" else None

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        table = learnt.get("levels", levels(self.bits).float())
        scale: Literal["one", "range"] = "one" if kv == "key" else "range"
        codes = Codebook(
            space.groups, space.width, space.page, table, "token", space.width, scale, read=learnt.get("read")
        )
        if kv == "key":
            return sparse(codes, "page", self.outliers, "large")
        return sparse(codes, "token", self.outliers, "far")

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        rows = stats.rows.float()
        if kv == "key":
            middle, size = self._by_channel(rows)
            found = {"middle": middle, "range": size}
            unit = (rows - middle) / size
            dense = unit.abs() <= 1
        else:
            middle, size, dense = self._by_token(rows, space)
            found, unit = {}, (rows - middle) / size
        weights = (stats.weight * size.square()).expand(unit.shape)
        found["levels"] = fitted(unit[dense], weights[dense], 2**self.bits)
        if self.bits == 2:
            found["read"] = normed(found["levels"], unit[dense])
        return found

    def _by_channel(self, rows: Float[Tensor, "m G r"]) -> tuple[Tensor, Tensor]:
        """(middle, range) [G, r] of each channel between its quantiles."""
        ordered, out = rows.sort(0).values, round(self.outliers / 2 * (len(rows) - 1))
        low, high = ordered[out], ordered[len(rows) - 1 - out]
        size = (high - low) / 2
        return (high + low) / 2, size.maximum(size.median() * NARROWER).clamp_min(NARROW)

    def _by_token(self, rows: Float[Tensor, "m G r"], space: Space) -> tuple[Tensor, Tensor, Tensor]:
        """(middle [m, G, 1], range [m, G, 1], what is no outlier [m, G, r]) of each token, as they will be stored."""
        packing = self.packing("value", space, {})
        count = packing.count if isinstance(packing, Sparse) else 0
        far = (rows - rows.mean(-1, keepdim=True)).abs()
        dense = far <= far.topk(count + 1).values[..., -1:]
        low, high = (torch.where(dense, rows, e).aminmax(dim=-1, keepdim=True) for e in (torch.inf, -torch.inf))
        return (high.max + low.min) / 2, ((high.max - low.min) / 2).clamp_min(NARROW), dense


METHOD = KVQuant
