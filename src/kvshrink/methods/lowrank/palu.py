"""Palu: low-rank keys and values by groups of heads, ranks by Fisher information. arXiv 2407.21118

The key and value projections of 4 KV heads at a time are factored, W = A B, and the latents x A are kept: cheaper to
rebuild than one basis of all heads, more accurate than one for each. Layers whose weights matter more to the loss get
more rank. Latents may be quantised per token, after a Hadamard rotation that is folded into the factors. Values stay
latent until after the softmax-weighted sum.

The factors are the paper's. With the layer input's second moment X^T X = L L^T it takes the SVD L^T W = U S V^T, so
that L^-T U_r S_r V_r^T is the rank-r product nearest to W in |X W - X W_r|. As L^-T U S = W V, it is W V_r V_r^T: the
key x W itself, projected on V_r. And V are the eigenvectors of W^T L L^T W = (X W)^T (X W), the uncentred second moment
of the keys. So the principal directions of uncentred keys are all that is needed.

Departures from the paper: the encoder reads the key, not the layer input, so biases and norms are no obstacle; 4 sinks
and 32 to 64 recent tokens are exact; Fisher information is that of a repeated passage of the calibration text; a
rotation has random signs, and where the rank is no power of two it is in blocks that are; ranks are multiples of less
than 32 where groups have less than 512 channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.methods._codecs.basis import BasisCodec, second_moment, spectrum
from kvshrink.methods._packing import packing
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._rotate import rotation
from kvshrink.methods._settings import keep_and_bits, require
from kvshrink.methods._stats import KVS, CalibrationStats, LayerShape, Probe
from kvshrink.methods.lowrank._ranks import in_proportion

STEP, WIDE = 32, 512  # the paper's ranks are multiples of 32 of groups of 512 channels; below that, 1/64 of a group


@final
@dataclass(frozen=True)
class Palu(Method):
    """Low-rank latents of groups of heads.

    keep:        share of channels, over keys and values of all layers; ranks are rounded down to multiples.
    bits:        bits of a stored latent: None (the model's dtype), 8, 4, 3 or 2, one scale a token and group of heads.
    group_heads: KV heads that share a basis, or the largest divisor of the model's heads below it.
    ranks:       "fisher" shares the ranks by measured Fisher information (the model must be in memory), "uniform" gives
                 every layer's keys and values the same.
    hadamard:    rotate the latents before they are quantised.
    """

    keep: float = 0.5
    bits: int | None = None
    group_heads: int = 4
    ranks: Literal["fisher", "uniform"] = "fisher"
    hadamard: bool = True

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"

    def check(self) -> None:
        super().check()
        keep_and_bits(self.keep, self.bits)
        require(self.group_heads >= 1, f"group_heads={self.group_heads}", "Use a whole number, 1 or more.")

    @property
    def probes(self) -> bool:
        return self.ranks == "fisher"

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        width, step = self._group(shape)
        return [rank / width for rank in range(step, width + 1, step)]

    def rank(self, shape: LayerShape) -> int:
        """Rank of each group, the mean over all layers' keys and values: the one place where ranks are rounded."""
        width, step = self._group(shape)
        units = int(self.keep * width / step + 1e-6)
        what = f"keep={self.keep} of {width} channels in steps of {step}"
        require(units >= 1, what, f"Use keep of at least {step}/{width}.")
        return units * step

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The mean over layers, which all together keep to, where nothing is fitted yet."""
        if fitted:
            return super().bits_per_token(shape, fitted)
        rank, groups = self.rank(shape), shape.width // self._group(shape)[0]
        return 2 * packing(groups, rank, self.page, self.bits, "token", rank, shape.dtype).page_bytes() * 8 / self.page

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """All directions of one layer, and the energy of each over the variance of the keys or values."""
        self.rank(stats.shape)  # says what is wrong before the ranks of all layers are known
        groups = stats.shape.width // self._group(stats.shape)[0]
        out: dict[str, Tensor] = {}
        for kv, moments in zip(KVS, (stats.key, stats.value), strict=True):
            energy, _, basis = spectrum(second_moment(moments), groups, stats.shape.width // groups)
            out |= {f"{kv}_basis": basis, f"{kv}_energy": energy / moments.covariance.trace()}
        return {k: t.float().contiguous() for k, t in out.items()}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        """Share the ranks between the keys and values of all layers, and drop the directions beyond them."""
        ranks = {(i, kv): self.rank(shapes[i]) for i in layers for kv in KVS}
        record: dict[str, Any] = {}
        if self.ranks == "fisher":
            assert probe is not None
            fisher = {(i, kv): x for i, pair in probe.fisher().items() for kv, x in zip(KVS, pair, strict=True)}
            for shape in dict.fromkeys(shapes.values()):  # a channel costs the same in all layers of a shape
                operands = [at for at in ranks if shapes[at[0]] == shape]
                width, step = self._group(shape)
                total = len(operands) * self.rank(shape) // step
                units = in_proportion(total, [fisher[at] for at in operands], width // step)
                ranks |= {at: n * step for at, n in zip(operands, units, strict=True)}
            record["fisher"] = {f"{i} {kv}": fisher[i, kv] for i, kv in ranks}
        record["ranks"] = {f"{i} {kv}": rank for (i, kv), rank in ranks.items()}
        done = {i: dict(fitted) for i, fitted in layers.items()}
        errors: dict[int, dict[str, Any]] = {i: {} for i in layers}
        for (i, kv), rank in ranks.items():
            errors[i][f"{kv}_error"] = float(layers[i][f"{kv}_energy"][:, rank:].double().sum())
            for name in (f"{kv}_basis", f"{kv}_energy"):
                done[i][name] = layers[i][name][:, :rank].contiguous()
        return done, record | {"layers": errors}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def _group(self, shape: LayerShape) -> tuple[int, int]:
        """(channels of a group of heads, step of its rank, which divides them)."""
        most = min(self.group_heads, shape.heads)
        width = next(n for n in range(most, 0, -1) if shape.heads % n == 0) * shape.head_dim
        return width, math.gcd(width, STEP if width >= WIDE else max(1, width // 64))

    def _codec(self, kv: str, shape: LayerShape, fitted: Fitted) -> BasisCodec:
        """A = W V S^-1/2 and B = S^1/2 V^T: both factors have half of the spectrum, as in the paper."""
        basis, energy = fitted[f"{kv}_basis"], fitted[f"{kv}_energy"]
        groups, rank, width = basis.shape
        root = torch.where(energy > 0, energy, torch.ones_like(energy)).pow(0.25)[:, :, None]
        down, up = (basis / root).transpose(1, 2), basis * root
        if self.bits is not None and self.hadamard:
            matrix = rotation(rank).to(up)
            down, up = down @ matrix, matrix.T @ up
        stored = packing(groups, rank, self.page, self.bits, "token", rank, shape.dtype)
        return BasisCodec("k_pre" if kv == "key" else "v", down, up, up.new_zeros(groups, width), stored)


METHOD = Palu
