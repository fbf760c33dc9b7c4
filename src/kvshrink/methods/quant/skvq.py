"""SKVQ: channels of like range side by side, clipped groups of 128, the recent window exact. arXiv 2405.06219

A token's channels, over all KV heads, are ordered on calibration text so that those of like minimum and maximum share a
scale: k-means on (minimum, maximum), then clusters one after the other, keys before RoPE and values each for
themselves. A group of 128 is stored in `bits` bits between minimum and maximum, both drawn in by a clip that is chosen
per layer on the calibration rows, with scale and minimum as 8-bit floats: 2.125 bits at 2. At 1.5 bits values have
three levels, five codes in a byte (1.725 bits), and keys 2 bits.

The order is a dense matrix over all heads that folds into the basis of keys and values. A fused kernel could gather
instead: a matrix of n x n for n = heads x channels is slow where layers are wide, and values are summed over n
channels for each query head before they are put in order again.

Departures: groups are equal, 128 channels each, cut from the ordered clusters; the paper's are its clusters, of any
size. One clip for a layer's keys and one for its values, drawing in both ends by the same amount about the middle; the
paper clips each group, and multiplies minimum and maximum. Rows are divided by one power of two for each before they
are stored, so that 8-bit floats neither end nor vanish. Between 128 and 160 recent tokens are exact, as pages of 32
leave the window; the paper quantises token by token. No filter of important tokens. In a basis' latents channels are
ordered within each group.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing import Affine, Codebook, Packing
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import KV
from kvshrink.shapes import Float, Int

BITS = (1.5, 2, 3, 4)
GROUP = 128
CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9)
ROUNDS = 50
ROOM = 64.0  # the largest calibration number as stored: 8-bit floats go to 448


@final
@dataclass(frozen=True)
class SKVQ(Quantiser):
    """`bits`-bit keys and values in groups of 128 reordered channels; 1.5: keys 2 bits, values three levels."""

    window: int = 128
    sinks: int = 5
    bits: int | float = 2

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS
    site: ClassVar[Literal["k_pre", "k_post"]] = "k_pre"

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        order, unit = Transform.ordered(learnt["order"].long()), learnt["unit"]
        return Transform(order.down / unit, order.up * unit, order.mean)

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        groups, width = (1, space.groups * space.width) if space.heads else (space.groups, space.width)
        clip, group = float(learnt.get("clip", 1.0)), min(GROUP, width)
        if kv == "value" and self.bits == 1.5:
            trits = torch.tensor([-1.0, 0.0, 1.0])
            return Codebook(groups, width, space.page, trits, "token", group, "range", "float8", clip)
        bits = 2 if self.bits == 1.5 else int(self.bits)
        return Affine(groups, width, space.page, bits, "token", group, clip, "float8")

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        rows = stats.rows.float()
        joined = rows.flatten(1)[:, None] if space.heads else rows  # [m, G, a]
        order = torch.stack([ordered(group, GROUP) for group in joined.unbind(1)])
        least = torch.maximum(rows.square().mean().sqrt(), rows.abs().max() / ROOM).clamp_min(1e-30)
        found = {"order": order.int(), "unit": torch.exp2(torch.log2(least).ceil())}
        errors = {c: stats.error(self._read(kv, rows, space, found | {"clip": torch.tensor(c)})) for c in CLIPS}
        return found | {"clip": torch.tensor(min(CLIPS, key=lambda c: float(errors[c])), device=rows.device)}

    def _read(self, kv: KV, rows: Float[Tensor, "m G r"], space: Space, learnt: Fitted) -> Tensor:
        """Rows as they would be read."""
        codec = BasisCodec("v", *self.transform(kv, space, learnt), self.packing(kv, space, learnt))
        whole = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -len(rows) % space.page)).transpose(0, 1)[None]
        return codec.decode(codec.encode(whole, None), space.groups)[0, :, : len(rows)].transpose(0, 1)


def ordered(rows: Float[Tensor, "m n"], group: int) -> Int[Tensor, " n"]:
    """Channels by cluster of (minimum, maximum), the clusters of the smallest range first, and so within a cluster."""
    ends = torch.stack([rows.amin(0), rows.amax(0)], 1).double()  # [n, 2]
    by_range = (ends[:, 1] - ends[:, 0]).argsort()
    count = -(-len(ends) // group)
    starts = (torch.arange(count, device=rows.device) * 2 + 1) * len(ends) // (2 * count)
    centres = ends[by_range[starts]]
    for _ in range(ROUNDS):
        members = torch.nn.functional.one_hot(torch.cdist(ends, centres).argmin(1), count).double()  # [n, count]
        size = members.sum(0)[:, None]
        centres = torch.where(size > 0, members.T @ ends / size.clamp_min(1), centres)
    label = torch.cdist(ends, centres).argmin(1)
    place = (centres[:, 1] - centres[:, 0]).argsort().argsort()[label]  # each channel's cluster, counted by range
    return by_range[place[by_range].argsort(stable=True)]


METHOD = SKVQ
