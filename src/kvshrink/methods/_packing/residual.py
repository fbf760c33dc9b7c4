"""What another packing loses of a page, as a product of two thin matrices: GEAR's low-rank error. arXiv 2403.05527

E = x - inner(x) of a page and a group of heads is nearly left @ right, [page, k] @ [k, r], both float16. right is an
orthonormal basis of E's rows from power iterations, left = E right^T the best there is beside it, so that the error
can only shrink.
"""

from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._packing.base import Around, Packing, Put, Stored, checked, joined, paged, there
from kvshrink.shapes import Bool, Float

ITERATIONS = 3
SEED = 0


@final
@dataclass(frozen=True, eq=False)
class Residual(Around):
    """`inner`, and its error of rank `rank`, at most the rows' width."""

    inner: Packing
    rank: int

    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        stored = put(latent, valid)
        error = paged(latent, self.page) - paged(self.inner.load(stored), self.page)
        real = there(valid, self.page)
        if real is not None:
            error = torch.where(real, error, 0.0)
        left, right = factors(error, self.rank)
        return {**stored, "left": checked(left.to(torch.float16)), "right": right.to(torch.float16)}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        left, right = stored["left"].float(), stored["right"].float()
        pages = paged(self.inner.load(stored), self.page)
        for i in range(self.rank):  # one by one: a matrix product may round equal rows differently
            pages = torch.addcmul(pages, left[..., i : i + 1], right[..., i : i + 1, :])
        return joined(pages)

    def page_bytes(self) -> int:
        return self.inner.page_bytes() + self.groups * self.rank * (self.page + self.width) * 2


def factors(error: Float[Tensor, "b p G page r"], rank: int) -> tuple[Tensor, Tensor]:
    """(left [.., page, k], right [.., k, r]): the leading part of each error, float64: in float32 the last bit of a
    product depends on how many pages are multiplied at once, and a page must be stored the same whatever is beside it.

    Orthonormalised in every iteration, which spans the same as once at the end would: the smaller components would
    fade beside the largest.
    """
    error = error.double()
    basis = _start(error.shape[-1], rank).to(error)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error.mT @ (error @ basis)).Q
    return error @ basis, basis.mT.contiguous()


@cache
def _start(width: int, rank: int) -> Float[Tensor, "width rank"]:
    """The same for every page, whatever else is stored with it."""
    return torch.randn(width, rank, generator=torch.Generator().manual_seed(SEED))
