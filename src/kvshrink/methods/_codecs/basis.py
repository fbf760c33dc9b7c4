"""A low-rank change of basis over groups of KV heads, and the closed forms that find it.

Rows of G groups (a = n / G channels each: h / G heads) become latents z = (x - mean) @ down, and come back as
z @ up + mean. An orthonormal basis has down = up^T and is stored once.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.decode import Basis
from kvshrink.methods._codec import Projection
from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.mixed import Mixed
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import CalibrationStats, Moments
from kvshrink.shapes import Float


@final
@dataclass(frozen=True, eq=False)
class BasisCodec(PackedCodec):
    """Rows projected on `down`, stored by `packing`, expanded by `up`. Tensors are float32."""

    site: Literal["k_pre", "k_post", "v"]
    down: Float[Tensor, "G a r"]
    up: Float[Tensor, "G r a"]
    mean: Float[Tensor, "G a"]
    packing: Packing
    constant: Float[Tensor, "h d"] | None = None

    def to(self, device: torch.device) -> "BasisCodec":
        """The same with its tensors there: a rotation that no fit has made comes from the CPU."""
        if self.up.device == device:
            return self
        constant = None if self.constant is None else self.constant.to(device)
        down, up, mean = (t.to(device) for t in (self.down, self.up, self.mean))
        return replace(self, down=down, up=up, mean=mean, constant=constant)

    def project(self, rows: Float[Tensor, "b h t d"]) -> Float[Tensor, "b G t r"]:
        groups = self.mean.shape[0]
        flat = rows.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)  # [b, G, t, a]
        return products(flat.float() - self.mean[:, None], self.down)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        groups = self.mean.shape[0]
        members = heads // groups
        if latent.shape[1] == groups:
            rows = products(latent, self.up).add_(self.mean[:, None])  # [b, G, x, a]
            found: Tensor = rows.unflatten(-1, (members, -1)).transpose(2, 3).flatten(1, 2)
            return found
        found = products(latent, self._by_head(heads)) + self.mean.unflatten(-1, (members, -1)).flatten(0, 1)[:, None]
        return found

    @cached_property
    def _rebuilt(self) -> bool:
        """Whether queries cannot be made to fit latents: RoPE lies between, or a mean would add q . mean."""
        return self.site == "k_pre" or (self.site == "k_post" and bool(self.mean.any()))

    def absorb(self, query: Float[Tensor, "b h x d"]) -> Float[Tensor, "b h x r"] | None:
        """q . (z up) = (q up^T) . z."""
        if self.site == "v" or self._rebuilt:
            return None
        return products(query, self._by_head(query.shape[1]).transpose(1, 2))

    @cached_property
    def expansion(self) -> Basis | None:
        return Basis(self.up, self.mean) if self._rebuilt else None

    @property
    def projection(self) -> Projection | None:
        """None also where bits follow the channels' variances: then the basis alone does not say what is lost."""
        if self.site == "k_post" or (isinstance(self.packing, Mixed) and not self.packing.alike):
            return None
        return Projection(self.up.shape[1], self.smooth)

    def smooth(self, rows: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Rows as they would come back if nothing were rounded: what the basis alone loses."""
        return self.expand(self.project(rows), rows.shape[1])

    def _by_head(self, heads: int) -> Float[Tensor, "h r d"]:
        if heads == len(self.up):
            return self.up
        found: Tensor = self.up.unflatten(-1, (heads // len(self.up), -1)).transpose(1, 2).flatten(0, 1)
        return found


def products(rows: Float[Tensor, "b G x n"], matrices: Float[Tensor, "G n m"]) -> Float[Tensor, "b G x m"]:
    """Of each group's rows with its matrix, which torch would copy for every row of the batch."""
    b, groups = rows.shape[:2]
    if groups > 1 and matrices.stride(0) == 0:  # one rotation for all
        return rows @ matrices[0]
    if b == 1:
        return rows @ matrices
    found: Tensor = torch.bmm(rows.transpose(0, 1).flatten(1, 2), matrices).unflatten(1, (b, -1)).transpose(0, 1)
    return found


def leading(fitted: Fitted, kv: str, rank: int) -> dict[str, Tensor]:
    """The tensors of keys or of values with the first `rank` components alone."""
    ends = {"up": 1, "down": 2, "errors": 0}  # the axis of components
    found = {f"{kv}_{name}": axis for name, axis in ends.items() if f"{kv}_{name}" in fitted}
    return {name: fitted[name].narrow(axis, 0, rank).contiguous() for name, axis in found.items()}


RIDGE = 1e-4  # of a metric's mean eigenvalue, added to it: a direction that costs nothing still gets a finite basis


def principal(
    covariance: Float[Tensor, "n n"], groups: int, rank: int, metric: Float[Tensor, "n n"] | None = None
) -> tuple[Tensor, Tensor]:
    """(down [G, a, r], up [G, r, a]): the basis of least squared error of each group (Eckart-Young), so the global
    optimum of CSKV's own loss without quantisation.

    metric M: the error e counts as e M e^T instead. With M = R^2 the rows x R have their principal directions V, and
    down = R V, up = V^T R^-1. Without a metric down is up^T.
    """
    return spectrum(covariance, groups, rank, metric)[1:]


def spectrum(
    covariance: Float[Tensor, "n n"], groups: int, rank: int, metric: Float[Tensor, "n n"] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `principal`, after the latents' variances [G, r], which are what each costs if it is left out."""
    blocks = torch.stack(blocks_of(covariance, groups)).double()
    if metric is None:
        up = _top(blocks, rank)
        return _variances(up, blocks), up.transpose(1, 2), up
    metrics = torch.stack(blocks_of(metric, groups)).double()
    size = metrics.shape[-1]
    ridge = metrics.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * RIDGE
    values, vectors = torch.linalg.eigh(metrics + ridge * torch.eye(size, dtype=metrics.dtype, device=metrics.device))
    root = vectors * values.sqrt()[:, None] @ vectors.transpose(1, 2)
    inverse = vectors / values.sqrt()[:, None] @ vectors.transpose(1, 2)
    weighed = root @ blocks @ root
    directions = _top(weighed, rank)
    return _variances(directions, weighed), root @ directions.transpose(1, 2), directions @ inverse


def second_moment(moments: Moments) -> Float[Tensor, "n n"]:
    """E[x^T x] of the rows as they are: what methods without a mean are optimal for."""
    return moments.covariance + torch.outer(moments.mean, moments.mean)


def key_metric(stats: CalibrationStats) -> Float[Tensor, "n n"]:
    """What an error in a key costs: the squared error of the scores, averaged over queries at all distances."""
    return torch.diag(stats.known("query_energy").double().flatten())


def value_metric(stats: CalibrationStats) -> Float[Tensor, "n n"]:
    """What an error in a value costs: the squared error of the layer's output, each head by itself."""
    found: Tensor = torch.block_diag(*stats.known("output_gram").double())
    return found


METRICS = {"key_metric": ("plain", "query"), "value_metric": ("plain", "output")}  # settings of `metrics_of`


def metrics_of(method: Any, stats: CalibrationStats) -> tuple[Tensor | None, Tensor | None]:
    """What `key_metric` and `value_metric` of a method name; None: plain."""
    return (
        key_metric(stats) if method.key_metric == "query" else None,
        value_metric(stats) if method.value_metric == "output" else None,
    )


def weighted_svd(
    weight: Float[Tensor, "n hidden"], scale: Float[Tensor, " hidden"], groups: int, rank: int
) -> tuple[Tensor, Tensor]:
    """(down [G, a, r], up [G, r, a]) from the SVD of diag(scale) W: ASVD (arXiv 2312.05821), plain SVD with scale 1.

    ASVD factors W = A B with A = diag(1/scale) U S^(1/2), B = S^(1/2) V^T. As A = W V S^(-1/2), the latent x A is
    k V S^(-1/2): the same factorisation, read off the key instead of the layer input.
    """
    scaled = weight.double() * scale.double()
    gram = scaled @ scaled.T
    blocks = torch.stack(blocks_of(gram, groups))
    right = _top(blocks, rank)
    # squared singular values along the kept directions; a direction of no energy keeps scale 1
    power = _variances(right, blocks)
    root = torch.where(power > 0, power, torch.ones_like(power)).pow(0.25)[:, :, None]
    return (right / root).transpose(1, 2), right * root


def orthonormal(groups: int, width: int, rank: int, seed: int) -> Float[Tensor, "G r a"]:
    """Random orthonormal bases: the control that shows what an initialisation adds."""
    noise = torch.randn(groups, width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found: Tensor = torch.linalg.qr(noise).Q.transpose(1, 2)
    return found


def blocks_of(matrix: Tensor, groups: int) -> list[Tensor]:
    """Diagonal blocks of a [n, n] matrix, one per group of heads."""
    size = matrix.shape[0] // groups
    return [matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)]


def _variances(directions: Tensor, blocks: Tensor) -> Tensor:
    return (directions @ blocks @ directions.transpose(1, 2)).diagonal(dim1=1, dim2=2).clamp_min(0.0)


def _top(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues as rows, [G, r, a], largest first."""
    vectors = torch.linalg.eigh(symmetric.double()).eigenvectors
    found: Tensor = vectors.flip(-1)[..., :rank].transpose(1, 2)
    return found
