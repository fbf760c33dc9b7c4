"""KVTC: transform coding of the cache: cross-head PCA, bits by dynamic programming, then DEFLATE. arXiv 2511.01815

Groups of 16 components of a layer's keys (before RoPE) and values get 0, 2, 3, 4 or 8 bits, so that the squared error
is the least that the bytes allow. Sinks and recent tokens are exact. The resident form, which is attended over, is
`spectral`'s page; `cache.save(path, deflate=True)` gives the paper's form for disks and wires.

Departures from the paper: attended over and not only stored; one PCA per layer, not shared by groups of layers; keys
and values of a layer get half of its bytes each; Lloyd-Max codes of whitened components with one gain a page and group,
not affine ones with scale and shift; tokens are coded in pages of 32, as they leave the window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.kernels.normal import expected_error
from kvshrink.methods._packing.mixed import group_bytes, group_sizes
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._stats import KVS, CalibrationStats, LayerShape
from kvshrink.methods.lowrank import _bits
from kvshrink.methods.lowrank._operand import energies_of, trimmed
from kvshrink.methods.lowrank.spectral import Spectral

CELLS = 2**14  # of a budget: more, and the steps of the budget are coarser than a byte


@final
@dataclass(frozen=True)
class KVTC(Method):
    """Principal components of keys and values with the bits of least squared error.

    budget: bytes of a layer's body over the full cache's, gains included, window and sinks not.
    widths: widths that a group of 16 components may have, beside 0.
    """

    budget: float = 0.1
    widths: tuple[int, ...] = (2, 3, 4, 8)

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "budget"

    def check(self) -> None:
        super().check()
        self._store().check()

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return self._store().budget_values(shape, tokens)

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The budget where nothing is fitted yet; up to a step of one group is left over from it."""
        bits = self._store().bits_per_token(shape, fitted)
        if not fitted and int(bits * self.page / 8) // 2 < self._smallest(shape):
            raise self._too_small(shape, "key")
        return bits

    def _smallest(self, shape: LayerShape) -> int:
        """Bytes of a page of one group."""
        return group_bytes(min(group_sizes(shape.width)), min(self.widths), self.page)

    def _too_small(self, shape: LayerShape, kv: str) -> SettingError:
        least = math.ceil(2 * self._smallest(shape) / (shape.token_bytes * self.page) * 1e4 + 1e-6) / 1e4
        return SettingError(f"budget={self.budget} leaves the {kv}s no group of components. Use {least} or more.")

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        out: Mapping[str, Tensor] = self._store().fit_layer(stats)
        sizes = group_sizes(stats.shape.width)
        whole = left = int(self.bits_per_token(stats.shape, {}) * self.page / 8)
        for kv, budget in zip(KVS, (whole // 2, whole), strict=True):
            # what the keys leave over goes to the values
            widths = allocate(energies_of(out, kv), sizes, min(budget, left), self.widths, self.page)
            left -= _bits.cost_of(widths, sizes, self.page)
            out = trimmed({**out, f"{kv}_widths": torch.tensor(widths, dtype=torch.uint8)}, kv)
            if not any(widths):
                raise self._too_small(stats.shape, kv)
        return dict(out)

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return self._store().codecs(shape, fitted)

    def _store(self) -> Spectral:
        """The resident form."""
        return Spectral(self.window, self.sinks, self.budget, self.widths, "uniform", code="scalar", rotate=False)


def allocate(
    energies: Sequence[float], sizes: Sequence[int], budget: int, widths: Sequence[int], page: int
) -> tuple[int, ...]:
    """Width of each group, of least squared error among all choices of at most `budget` bytes a page.

    Dynamic programming over groups and bytes. The budget is counted in the greatest step that all sizes share, so
    nothing is lost; above CELLS steps in coarser ones, and sizes are rounded up, so the budget still holds.
    """
    choices = (0, *sorted(widths))
    errors = [expected_error(width) for width in choices]
    costs = [[group_bytes(size, w, page) for w in choices] for size in sizes]
    step = max(math.gcd(*(c for row in costs for c in row)), -(-budget // CELLS), 1)
    cells = budget // step
    least = torch.zeros(cells + 1, dtype=torch.float64)  # error of the groups so far, in at most so many steps
    taken = torch.zeros(len(sizes), cells + 1, dtype=torch.uint8)
    for g, energy in enumerate(energies):
        before, least = least, torch.full_like(least, torch.inf)
        for n in range(len(choices)):
            at = -(-costs[g][n] // step)
            if at > cells:
                continue
            error = before[: cells + 1 - at] + energy * errors[n]
            better = error < least[at:]
            least[at:][better] = error[better]
            taken[g, at:][better] = n
    chosen = []
    for g in reversed(range(len(sizes))):
        n = int(taken[g, cells])
        chosen.append(choices[n])
        cells -= -(-costs[g][n] // step)
    return tuple(reversed(chosen))


METHOD = KVTC
