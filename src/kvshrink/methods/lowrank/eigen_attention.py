"""EigenAttention: keys and values in the principal subspace of what a head sees. arXiv 2408.05646

The SVD of the keys (before RoPE) and values of a calibration text gives a basis: one of the head dimension for the keys
of all heads of a layer, one for each head's values. A layer's rank is the least that keeps a threshold of the energy,
so that layers which need little keep little. Such bases are small and a key is cheap to rebuild; that no basis mixes
the channels of two heads costs accuracy.

Departures from the paper: its threshold is lowered layer by layer until that layer's output has a given error; here one
threshold holds for the keys and values of all layers, the highest whose ranks fit `keep`. Models without RoPE get their
key basis from keys alone too, not from keys and queries. 4 sinks and 32 to 64 recent tokens are exact. Latents may be
quantised, keys per channel over a page and values per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from kvshrink.methods._codecs.basis import BasisCodec, second_moment, spectrum
from kvshrink.methods._packing import Affine, Raw, packing
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._settings import keep_and_bits, require
from kvshrink.methods._stats import KVS, CalibrationStats, LayerShape, Probe
from kvshrink.methods.lowrank._ranks import by_threshold


@final
@dataclass(frozen=True)
class EigenAttention(Method):
    """Latents of each head, ranks by one threshold of the energy kept.

    keep: share of channels, over keys and values of all layers; the threshold follows from it.
    bits: bits of a stored latent: None (the model's dtype), 8, 4, 3 or 2.
    """

    keep: float = 0.5
    bits: int | None = None

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"

    def check(self) -> None:
        super().check()
        keep_and_bits(self.keep, self.bits)

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return [total / (2 * shape.head_dim) for total in range(2, 2 * shape.head_dim + 1)]

    def ranks(self, shape: LayerShape) -> tuple[int, int]:
        """(key rank, value rank) of a head before anything is known of the layers; an odd channel goes to values."""
        total = int(2 * self.keep * shape.head_dim + 1e-6)
        what = f"keep={self.keep} of {shape.head_dim} channels of keys and values"
        require(total >= 2, what, f"Use keep of at least 1/{shape.head_dim}.")
        return total // 2, total - total // 2

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The mean over layers, which all together keep to, where nothing is fitted yet."""
        return super().bits_per_token(shape, fitted) if fitted else self._budget(shape) * 8 / self.page

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """All directions of one layer, and the energy of each over the variance of the keys or values."""
        shape = stats.shape
        self.ranks(shape)  # says what is wrong before the ranks of all layers are known
        out: dict[str, Tensor] = {}
        for kv, moments in zip(KVS, (stats.key, stats.value), strict=True):
            second = second_moment(moments)
            if kv == "key":  # the rows of all heads, one below the other, have the sum of the heads' moments
                parts = second.unflatten(0, (shape.heads, -1)).unflatten(2, (shape.heads, -1))
                second = parts.diagonal(dim1=0, dim2=2).sum(-1)
            energy, _, basis = spectrum(second, second.shape[0] // shape.head_dim, shape.head_dim)
            out |= {f"{kv}_basis": basis, f"{kv}_energy": energy / moments.covariance.trace()}
        return {k: t.float().contiguous() for k, t in out.items()}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        """Find the threshold that meets the budget, and drop the directions that it does not need."""
        operands = [(i, kv) for i in layers for kv in KVS]
        kept = [_kept(layers[i][f"{kv}_energy"]) for i, kv in operands]
        costs = [
            [0, *(self._packed(kv, shapes[i], rank + 1).page_bytes() for rank in range(shapes[i].head_dim))]
            for i, kv in operands
        ]
        given = by_threshold(kept, costs, sum(self._budget(shapes[i]) for i in layers))
        done = {i: dict(fitted) for i, fitted in layers.items()}
        errors: dict[int, dict[str, Any]] = {i: {} for i in layers}
        for (i, kv), rank in zip(operands, given, strict=True):
            errors[i][f"{kv}_error"] = float(done[i].pop(f"{kv}_energy")[:, rank:].double().sum())
            done[i][f"{kv}_basis"] = layers[i][f"{kv}_basis"][:, :rank].contiguous()
        named = {f"{i} {kv}": rank for (i, kv), rank in zip(operands, given, strict=True)}
        threshold = min(k[rank] for k, rank in zip(kept, given, strict=True))
        return done, {"ranks": named, "threshold": threshold, "layers": errors}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def _budget(self, shape: LayerShape) -> int:
        """Bytes of a layer's page, keys and values."""
        return sum(self._packed(s, shape, r).page_bytes() for s, r in zip(KVS, self.ranks(shape), strict=True))

    def _packed(self, kv: str, shape: LayerShape, rank: int) -> Raw | Affine:
        axis = "channel" if kv == "key" else "token"
        return packing(shape.heads, rank, self.page, self.bits, axis, rank, shape.dtype)

    def _codec(self, kv: str, shape: LayerShape, fitted: Fitted) -> BasisCodec:
        up = fitted[f"{kv}_basis"].expand(shape.heads, -1, -1)  # the keys' one basis is held once
        stored = self._packed(kv, shape, up.shape[1])
        mean = up.new_zeros(shape.heads, shape.head_dim)
        return BasisCodec("k_pre" if kv == "key" else "v", up.transpose(1, 2), up, mean, stored)


def _kept(energy: Tensor) -> list[float]:
    """Share of the energy at each rank from 0 on, of the basis that keeps least: all heads have one rank."""
    share = energy.double().cumsum(1) / energy.double().sum(1, keepdim=True).clamp_min(1e-30)
    return [0.0, *share.amin(0).tolist()]


METHOD = EigenAttention
