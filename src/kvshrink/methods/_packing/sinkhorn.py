"""A page whose channels, and whose tokens, all have the same size before it is stored: KVarN's. arXiv 2606.03458

Tokens and channels are divided by their root mean squares in turn, as Sinkhorn's matrix scaling does, so that neither a
large token nor a large channel sets the steps of others. The channels' factors are stored; the tokens' are in the
scales that `inner` has for each token.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.methods._packing.base import Around, Packing, Put, Stored, checked, joined, paged, there
from kvshrink.shapes import Bool, Float

ITERATIONS = 16
TINY = 1e-6  # a channel, or a token, of zeros has no size of its own


@final
@dataclass(frozen=True, eq=False)
class Sinkhorn(Around):
    """`inner`, which has a scale for each token, of pages whose channels were made alike."""

    inner: Packing

    def store_with(self, put: Put, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        pages = paged(latent, self.page)
        columns = checked(factors(pages, there(valid, self.page)).to(torch.float16))
        return {**put(joined(pages / columns.float()[..., None, :]), valid), "columns": columns}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        pages = paged(self.inner.load(stored), self.page)
        return joined(pages * stored["columns"].float()[..., None, :])

    def page_bytes(self) -> int:
        return self.inner.page_bytes() + self.groups * self.width * 2

    @property
    def metadata(self) -> frozenset[str]:
        return self.inner.metadata | {"columns"}


def factors(
    pages: Float[Tensor, "b p G page r"], real: Bool[Tensor, "b p 1 page 1"] | None
) -> Float[Tensor, "b p G r"]:
    """Of each channel; float64, so that a page has the same whatever is beside it."""
    square = pages.double().square()
    if real is not None:
        square = torch.where(real, square, 0.0)
    count = square.new_full((1, 1, 1, 1, 1), pages.shape[3]) if real is None else real.sum(3, keepdim=True).clamp_min(1)
    rows = torch.ones_like(square[..., :1])
    columns = torch.ones_like(square[..., :1, :])
    for _ in range(ITERATIONS):
        columns = (square / rows).sum(3, keepdim=True).div(count).clamp_min(TINY**2)
        rows = (square / columns).mean(4, keepdim=True).clamp_min(TINY**2)
    found = columns.sqrt()
    # one number of freedom between rows and columns: so that the channels' factors are neither large nor small
    size = found.log().mean(4, keepdim=True).exp()
    return (found / size)[..., 0, :].clamp(2.0**-14, 2.0**15).float()  # float16's, should most channels be empty
