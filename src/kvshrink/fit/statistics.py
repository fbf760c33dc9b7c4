"""Streamed moments of keys and values: what the closed forms need, in n x n numbers however long the text."""

import torch
from torch import Tensor

from kvshrink.cache.rope import Rope
from kvshrink.errors import DataError
from kvshrink.methods._stats import Moments
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


class EnergyStream:
    """Mean square of the queries that read each KV head, per channel, [h, d]."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0

    def add(self, queries: Float[Tensor, "b q s d"], heads: int) -> None:
        energy = queries.square().sum((0, 2), dtype=torch.float32)
        self.total = self.total + energy.unflatten(0, (heads, -1)).sum(1, dtype=torch.float64)
        self.count += queries.shape[0] * queries.shape[2]

    def mean(self, rope: Rope | None) -> Float[Tensor, "h d"] | None:
        """Both channels of a RoPE pair get their mean: over all rotations of a query it is the same. None: no query."""
        if not self.count:
            return None
        energy = torch.as_tensor(self.total) / self.count
        if rope is None:
            return energy
        first, second = rope.pairs()
        tied = energy.clone()
        tied[:, first] = tied[:, second] = (energy[:, first] + energy[:, second]) / 2
        return tied


def output_gram(weight: Float[Tensor, "hidden q d"], heads: int) -> Float[Tensor, "h d d"]:
    """W_O^T W_O summed over the query heads of each KV head."""
    members = weight.shape[1] // heads
    # a head at a time: the whole weight in float32 would be a copy of it
    grams = [sum(w.float().T @ w.float() for w in part.unbind(1)) for part in weight.detach().split(members, 1)]
    return torch.stack(grams).double()


def residual(moments: Moments, down: Tensor, up: Tensor, mean: Tensor) -> float:
    """Relative squared error |x - x'|^2 / |x - E x|^2 of x' = (x - mean) down up + mean, from the moments alone."""
    return float(residuals(moments, down, up, mean)[-1])


def residuals(
    moments: Moments, down: Float[Tensor, "G a r"], up: Float[Tensor, "G r a"], mean: Float[Tensor, "G a"]
) -> Float[Tensor, " r"]:
    """`residual` of the first 1, 2, .. r components of every group.

    With S = E (x - mean)^T (x - mean) it is tr S - 2 tr(up S down) + tr(up^T down^T S down up), where leaving out
    components leaves out rows and columns of the r x r matrices up S down, down^T S down and up up^T.
    """
    groups, size = mean.shape
    total = torch.zeros(down.shape[2], dtype=torch.float64, device=up.device)
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        offset, d, u = moments.mean[rows].double() - mean[g].double(), down[g].double(), up[g].double()
        second = moments.covariance[rows, rows].double() + torch.outer(offset, offset)
        kept = (d.T @ second @ d) * (u @ u.T)
        square = kept.cumsum(0).cumsum(1).diagonal()
        total += second.trace() - 2 * (u @ second @ d).diagonal().cumsum(0) + square
    return total.clamp_min(0) / moments.covariance.trace()


def describe(fitted: dict[str, Tensor], kv: str, moments: Moments) -> dict[str, float]:
    """Adds to a basis what the calibration rows were like: their mean, and the error by number of components.

    Returns the error of all components for the record, or nothing for a method without a basis.
    """
    up = fitted.get(f"{kv}_up")
    if up is None:
        return {}
    down = fitted.get(f"{kv}_down", up.transpose(1, 2))
    errors = residuals(moments, down, up, fitted[f"{kv}_mean"])
    fitted[f"{kv}_errors"], fitted[f"{kv}_centre"] = errors.float(), moments.mean.float()
    return {f"{kv}_error": float(errors[-1])}
