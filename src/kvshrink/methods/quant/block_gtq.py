"""Block-GTQ: TurboQuant's codes, with more bits for the RoPE frequencies that carry the scores. arXiv 2606.24033

After RoPE a key's part in a score is a sum over the pairs of channels that turn together. Each pair of each KV head is
weighted by the mean square of its queries times that of its keys, and whole bits are given one by one to where the
weighted error, which a bit quarters, falls most, `bits` on average over a head. Values have `bits` everywhere.

Departures: all pairs of one width, of all heads, are one run with one scale a token, each head's brought to the same
size by calibration, where the paper has a norm a head; a head's channels in a run are rotated together; widths are 1 to
4 bits; sinks and a recent window are exact. Written from descriptions of the paper.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._codecs.basis import orthonormal
from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.blocks import WIDTHS, Blocks
from kvshrink.methods._quantiser import Quantiser, SideStats, Space, Transform
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import KV
from kvshrink.shapes import Float, Int

BITS = (2, 3)
SEED = 0


@final
@dataclass(frozen=True)
class BlockGTQ(Quantiser):
    """`bits` a channel on average over a head's keys, after RoPE, and of every value."""

    bits: int = 3

    needs_fit: ClassVar[bool] = True
    of_latents: ClassVar[bool] = False  # latents have no frequencies
    budget_setting: ClassVar[str] = "bits"
    offered: ClassVar[tuple[Any, ...]] = BITS

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        """widths: bits of each head's channels; unit: the size of each, alike within a head's run."""
        energy = stats.rows.float().square().mean(0)  # [h, d]
        widths = torch.full_like(energy, self.bits, dtype=torch.int32)
        if kv == "key":
            blocks = blocks_of(space.width, stats.pairs)
            widths = torch.stack([shared(w * e, blocks, self.bits) for w, e in zip(stats.weight, energy, strict=True)])
        unit = torch.empty_like(energy).flatten()
        for run in runs_of(widths):
            unit[run] = energy.flatten()[run].mean().sqrt().clamp_min(1e-6)
        return {"widths": widths, "unit": unit.view_as(energy)}

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform:
        """Each head's channels of one width by their size and rotated together, then all heads' by width."""
        widths, unit = learnt["widths"].flatten(), learnt["unit"].flatten()
        order = widths.argsort(stable=True)
        turned = torch.zeros(len(order), len(order), device=unit.device)
        for run in runs_of(learnt["widths"]):
            turned[run[:, None], run] = orthonormal(1, len(run), len(run), SEED)[0].float().to(unit.device)
        placed = turned[:, order]
        return Transform((placed / unit[:, None])[None], (placed.T * unit)[None], unit.new_zeros(1, len(unit)))

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        channels = space.groups * space.width
        if not learnt:
            return Blocks(tuple(channels * (bits == self.bits) for bits in WIDTHS), space.page)
        return Blocks(tuple(int((learnt["widths"] == bits).sum()) for bits in WIDTHS), space.page)


def runs_of(widths: Int[Tensor, "h d"]) -> list[Int[Tensor, " n"]]:
    """The channels of each head and width, counted over all heads, where there are any."""
    alike = [(head == bits).nonzero()[:, 0] + h * len(head) for h, head in enumerate(widths) for bits in WIDTHS]
    return [run for run in alike if len(run)]


def blocks_of(width: int, pairs: tuple[Tensor, Tensor] | None) -> Int[Tensor, " d"]:
    """The block that each channel is in: a pair that RoPE turns, or itself where it turns none."""
    found = torch.arange(width)
    if pairs is not None:
        found[pairs[1].cpu()] = pairs[0].cpu()
    return found


def shared(score: Float[Tensor, " d"], blocks: Int[Tensor, " d"], bits: int) -> Int[Tensor, " d"]:
    """Bits of a head's channels, alike in a block: 1, and one more where the error falls most, `bits` on average."""
    of_block = torch.zeros(len(score)).index_add_(0, blocks, score.cpu().float())
    size = torch.zeros(len(score)).index_add_(0, blocks, torch.ones(len(score)))
    widths, left = torch.where(size > 0, 1, 0), len(score) * (bits - 1)
    while left > 0:
        gain = of_block / size.clamp_min(1) * 4.0**-widths
        gain[(widths == max(WIDTHS)) | (size == 0) | (size > left)] = -1.0
        best = int(gain.argmax())
        if gain[best] < 0:  # a pair is left and a bit for one channel
            break
        widths[best] += 1
        left -= int(size[best])
    return widths[blocks].int().to(score.device)


METHOD = BlockGTQ
