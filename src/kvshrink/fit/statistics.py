"""Streamed moments of keys and values: what the closed forms need, in n x n numbers however long the text."""

import torch
from torch import Tensor

from kvshrink.errors import DataError
from kvshrink.methods._roles import Moments
from kvshrink.shapes import Float


class MomentStream:
    """Mean and covariance of rows [.., n], one batch at a time; sums in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor | None = None  # near the mean, so that a large mean does not drown the covariance
        self.first: Tensor
        self.second: Tensor

    def add(self, rows: Float[Tensor, "*rows n"]) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).float()
        if self.shift is None:
            self.shift = rows.mean(0)
            self.first = torch.zeros_like(self.shift, dtype=torch.float64)
            self.second = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64, device=rows.device)
        centred = rows - self.shift
        self.count += len(rows)
        self.first += centred.sum(0, dtype=torch.float64)
        self.second += centred.T @ centred

    def moments(self) -> Moments:
        """Raises DataError if nothing was added or something was not finite."""
        if self.shift is None:
            raise DataError("no calibration rows were seen. Give some text.")
        offset = self.first / self.count
        covariance = self.second / self.count - torch.outer(offset, offset)
        if not bool(covariance.isfinite().all()):
            raise DataError(
                "the model's keys or values are NaN or infinite on the calibration text. Check the weights."
            )
        return Moments(self.count, self.shift.double() + offset, covariance)


class ScaleStream:
    """Mean |x| per channel: ASVD's statistic on the layer input (arXiv 2312.05821)."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0

    def add(self, rows: Float[Tensor, "*rows n"]) -> None:
        self.total = self.total + rows.abs().flatten(0, -2).sum(0, dtype=torch.float64)
        self.count += rows[..., 0].numel()

    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / max(1, self.count)


def residual(moments: Moments, down: Tensor, up: Tensor, mean: Tensor) -> float:
    """Relative squared error |x - x'|^2 / |x - E x|^2 of x' = (x - mean) down up + mean, from the moments alone.

    down [G, a, r], up [G, r, a], mean [G, a].
    """
    groups, size = mean.shape
    lost = 0.0
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        left = torch.eye(size, dtype=torch.float64, device=up.device) - down[g].double() @ up[g].double()
        offset = (moments.mean[rows] - mean[g].double()) @ left
        lost += float(torch.trace(left.T @ moments.covariance[rows, rows] @ left) + offset @ offset)
    return max(0.0, lost) / float(torch.trace(moments.covariance))
