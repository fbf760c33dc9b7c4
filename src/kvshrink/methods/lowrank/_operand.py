"""Keys, or values, of a layer as spectral bits see them: bases, groups of channels and their energy."""

import torch
from torch import Tensor

from kvshrink.methods._packing.mixed import group_sizes
from kvshrink.methods._roles import Fitted

NOISE = 1e-7  # of all variance: what float32 sums leave of a direction that has none


def layout_of(fitted: Fitted, kv: str) -> tuple[int, tuple[int, ...]]:
    """(bases, channels of each group of one of them)."""
    bases = len(fitted[f"{kv}_mean"])
    return bases, group_sizes(len(fitted[f"{kv}_variance"]) // bases)


def energies_of(fitted: Fitted, kv: str) -> list[float]:
    """Variance of each group of channels, over all bases; 0 where it is no more than the noise of a sum."""
    variance = fitted[f"{kv}_variance"].double().view(len(fitted[f"{kv}_mean"]), -1)
    found = [float(part.sum()) for part in variance.split(group_sizes(variance.shape[1]), 1)]
    return [x if x > NOISE * sum(found) else 0.0 for x in found]


def trimmed(fitted: Fitted, kv: str) -> dict[str, Tensor]:
    """Without the directions of width 0."""
    widths, variance = fitted[f"{kv}_widths"], fitted[f"{kv}_variance"].view(len(fitted[f"{kv}_mean"]), -1)
    sizes = torch.tensor(group_sizes(variance.shape[1]), device=widths.device, dtype=torch.long)
    there = (widths > 0).repeat_interleave(sizes)
    changed = {
        f"{kv}_widths": widths[widths > 0],
        f"{kv}_variance": variance[:, there].flatten(),
        f"{kv}_up": fitted[f"{kv}_up"][:, there],
    }
    if f"{kv}_down" in fitted:
        changed[f"{kv}_down"] = fitted[f"{kv}_down"][..., there]
    return {**fitted, **{k: t.contiguous() for k, t in changed.items()}}
