"""A2ATS: a code of each key says which tokens should be read. arXiv 2502.12665

Every key has, beside its stored form, the index of the nearest centroid of its KV head: one byte. A new token's query
meets the centroids once; a token's score is then a look-up, and the `topk` best of the body are read and scored
exactly, sinks and window always. Centroids are found on calibration text so that scores come out right, not keys: with
H = E[q q^T] = L L^T the squared error of a score is |(k - c) L|^2 on average, so k-means runs on k L (query-aware
vector quantisation). That saves reads, never bytes: the index comes on top.

Keys are indexed before RoPE, and what chooses tokens is the product as if all were where the query is: the paper's
windowed RoPE has a constant distance beyond its window, ours is 0. Those chosen get their true positions.

Departures: the paper keeps 16-bit keys and values in the host's memory; here they stay on the device as `bits`-bit
codes, keys per channel over a page and values per token; up to 256 centroids a head, so that an index is a byte; one
choice per layer, by the sum of the query heads' scores. Several new tokens at once read all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.latents import Packed
from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.base import Importance
from kvshrink.methods._quantiser import Quantiser, Space, axes
from kvshrink.methods._roles import Codec, Fitted, Stored
from kvshrink.methods._settings import check_topk, one_of, reads_part, require
from kvshrink.methods._stats import KV, CalibrationStats, LayerShape
from kvshrink.shapes import Bool, Float, Int

CENTROIDS = 256
ROUNDS = 20  # of Lloyd's iteration
SEED = 0
RIDGE = 1e-4  # of H's mean eigenvalue, added to it


@final
@dataclass(frozen=True, eq=False)
class IndexedCodec(Codec):
    """Keys with an index. factor: L; centroids: in the space of keys."""

    plain: HeadwiseCodec
    factor: Float[Tensor, "h d d"]
    centroids: Float[Tensor, "h n d"]
    topk: int | float
    site = "k_pre"

    @property
    def metadata(self) -> frozenset[str]:
        return self.plain.metadata | {"index"}

    @property
    def width(self) -> int:
        return self.plain.width

    def to(self, device: torch.device) -> "IndexedCodec":
        return replace(self, factor=self.factor.to(device), centroids=self.centroids.to(device))

    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        stored = self.plain.encode(rows, valid)
        index = nearest(rows.float() @ self.factor, self.centroids @ self.factor)
        if valid is not None:
            index = index.masked_fill(~valid[:, None], 0)
        return {**stored, "index": index.unflatten(2, (-1, self.plain.packing.page)).transpose(1, 2).contiguous()}

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.plain.unpack(stored)

    def sound(self, stored: Stored) -> bool:
        return int(stored["index"].max()) < self.centroids.shape[1] and self.plain.sound(stored)

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        return self.plain.pick(stored, tokens)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return latent

    def packed(self, stored: Stored) -> Packed | None:
        return self.plain.packed(stored)

    def page_bytes(self) -> int:
        return self.plain.page_bytes() + self.plain.packing.page * len(self.centroids)

    def reads(self, tokens: int) -> int | None:
        if isinstance(self.topk, float):
            return math.ceil(self.topk * tokens)
        return self.topk if self.topk < tokens else None

    def scores(self, query: Float[Tensor, "b h x d"], stored: Stored) -> Float[Tensor, "b t"]:
        """Sum over the query heads of q . c, c the centroid of each head's key."""
        table = (query.sum(2, keepdim=True) @ self.centroids.transpose(1, 2))[:, :, 0]  # [b, h, n]
        index = stored["index"].transpose(1, 2).flatten(2).long()  # [b, h, t]
        return table.gather(2, index).sum(1)


@final
@dataclass(frozen=True)
class A2ATS(Quantiser):
    """`bits`-bit keys and values, of which a new token reads the `topk` best: a number, or a share as 0.125."""

    bits: int | None = 4
    topk: int | float = 0.125
    group: int = 32

    needs_fit: ClassVar[bool] = True
    site: ClassVar[Literal["k_pre", "k_post"]] = "k_pre"
    of_latents: ClassVar[bool] = False  # an index is of keys, and latents have none of their own
    budget_setting: ClassVar[str] = "bits"

    def budget_values(self, shape: LayerShape, tokens: int) -> tuple[int | None, ...]:
        return (*sorted(WIDTHS), None)

    def check(self) -> None:
        super().check()
        one_of("bits", self.bits, (None, *sorted(WIDTHS)))
        check_topk(self.topk)
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")

    def apart(self, fitted: Fitted) -> str | None:
        return reads_part(self.topk)

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "channel" if kv == "key" else "token", self.group)

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        assert stats.sample is not None
        queries = (
            stats.sample.queries_pre_rope.unflatten(1, (stats.shape.heads, -1)).transpose(0, 1).flatten(1, 2)
        )  # [h, n, d]
        factor = torch.stack([_factor(q.double()) for q in queries]).float()
        keys = stats.sample.keys_pre_rope.transpose(0, 1)  # [h, m, d]
        found = torch.stack([means(rows) for rows in keys @ factor])
        centroids = torch.linalg.solve(factor.double(), found.double(), left=False).float()
        return {"factor": factor.contiguous(), "centroids": centroids.contiguous()}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        key, value = super().codecs(shape, fitted)
        assert isinstance(key, HeadwiseCodec)
        return IndexedCodec(key, fitted["factor"], fitted["centroids"], self.topk), value

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        return super().bits_per_token(shape, fitted) + 8 * shape.heads


def _factor(queries: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """L of E[q^T q] = L L^T."""
    moment = queries.T @ queries / len(queries)
    ridge = float(moment.diagonal().mean()) * RIDGE
    found: Tensor = torch.linalg.cholesky(
        moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    )
    return found


def means(rows: Float[Tensor, "m d"], count: int = CENTROIDS) -> Float[Tensor, "n d"]:
    """Centroids of k-means. One that loses all its rows stays where it is."""
    centroids = _spread(rows, min(count, len(rows)))
    for _ in range(ROUNDS):
        index = nearest(rows[None, None], centroids[None])[0, 0].long()
        sizes = torch.bincount(index, minlength=len(centroids))[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, index, rows)
        centroids = torch.where(sizes > 0, sums / sizes.clamp_min(1), centroids)
    return centroids


def _spread(rows: Float[Tensor, "m d"], count: int) -> Float[Tensor, "n d"]:
    """Rows to begin with, each drawn by its squared distance from those before it (k-means++)."""
    g, chosen = torch.Generator().manual_seed(SEED), [0]
    away = (rows - rows[0]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(torch.multinomial(away.cpu() + 1e-30, 1, generator=g)))
        away = torch.minimum(away, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen].clone()


def nearest(rows: Float[Tensor, "b h t d"], centroids: Float[Tensor, "h n d"]) -> Tensor:
    """Index of each row's nearest centroid, uint8 [b, h, t]."""
    return torch.cat(list(_nearest(rows, centroids)), 2)


def _nearest(rows: Tensor, centroids: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, so that distances stay few."""
    sizes = centroids.square().sum(-1)[:, None]
    for part in rows.split(512, 2):
        yield (sizes - 2 * part @ centroids.transpose(1, 2)).argmin(-1).to(torch.uint8)


METHOD = A2ATS
