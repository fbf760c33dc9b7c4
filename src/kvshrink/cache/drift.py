"""How far a live sequence is from the calibration text: what the fitted basis loses of it, beside what it lost there.

    error = sum |x - x'|^2 / sum |x - m|^2        over the tokens encoded so far, all sequences of the batch together
    drift = error / (the same on the calibration text)

for keys before RoPE and for values of a layer: x' is x projected on the basis and back, without rounding (rounding
follows the text by itself, a basis does not), m is the mean of the calibration text. Two sums each for keys and values
are kept, no number per token; pads, sinks and the window are not in them, tokens cropped later are. An input that is
larger as a whole around m has the same error, and so no drift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshrink.shapes import Bool, Float

FLOOR = 1e-6  # a calibration error below this is rounding, and nothing to compare with
LIMIT = 2.0  # drift above which a report says so


@dataclass(frozen=True, eq=False)
class Reference:
    """Keys or values of one layer as the calibration text was."""

    smooth: Callable[[Tensor], Tensor]  # rows [b, h, t, d] as the basis gives them back, without rounding
    centre: Float[Tensor, " n"]
    error: float

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reference":
        return self


class Drift(NamedTuple):
    """Live error over calibration error; None before any token was encoded."""

    key: float | None
    value: float | None

    @property
    def drifted(self) -> bool:
        return any(x is not None and x > LIMIT for x in self)


class DriftWatch:
    """Running sums of one layer: for keys and values, squared error and squared deviation."""

    def __init__(self, references: tuple[Reference, Reference]) -> None:
        self.references = references
        self.clear()

    def clear(self) -> None:
        device = self.references[0].centre.device
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)

    def add(
        self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None
    ) -> None:
        """Count the tokens of some pages. Invalid ones may hold anything."""
        parts = []
        for rows, reference in zip((keys, values), self.references, strict=True):
            rows = rows.float()
            if valid is not None:
                rows = rows.masked_fill(~valid[:, None, :, None], 0.0)
            for other in (reference.smooth(rows), reference.centre.view(rows.shape[1], 1, -1)):
                squares = (rows - other).square().sum((1, 3), dtype=torch.float64)
                parts.append((squares if valid is None else squares.masked_fill(~valid, 0.0)).sum())
        self.sums = self.sums + torch.stack(parts).view(2, 2)  # not in place: a saved state may hold the tensor

    def drift(self) -> Drift:
        errors = [error / deviation if deviation > 0 else None for error, deviation in self.sums.tolist()]
        ratios = [e if e is None else e / max(r.error, FLOOR) for e, r in zip(errors, self.references, strict=True)]
        return Drift(*ratios)
