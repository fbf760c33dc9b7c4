"""CSKV: channel shrinking for the KV cache. arXiv 2409.10593

Keep a low-rank latent of every key and value and the recent tokens exact beside it. Keys are latent before RoPE and
rebuilt a block at a time; values stay latent until after the softmax-weighted sum. Latents may be quantised: keys per
channel over a page of 32 tokens, values per token; or as a method of quant/ stores them (`codec`), whose change of
basis folds into this one.

Departures from the paper: the basis is found in closed form by default (the optimum of the paper's own loss); the
encoder reads the key, not the layer input, so biases and q/k norms are no obstacle; rows are centred; 4 sinks are
exact; the zero point is a float (the official one is clamped); between 32 and 64 recent tokens are exact, not 1 to 32
(at 8 bits with `budget`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.kernels.ceilings import measure
from kvshrink.methods import _latents as latents
from kvshrink.methods._codecs.basis import METRICS, BasisCodec, leading, metrics_of
from kvshrink.methods._ladder import Ladder, aged, held
from kvshrink.methods._packing import Packing, packing
from kvshrink.methods._policy import Policy
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted, Method
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV, KVS, CalibrationStats, LayerShape, Probe
from kvshrink.methods._tier import Tier
from kvshrink.methods._training import Training
from kvshrink.methods.lowrank import _ranked, _ranks
from kvshrink.methods.lowrank._cskv_settings import checked
from kvshrink.methods.lowrank._groups import Cost, bases_of, heads_per_basis, shard_heads
from kvshrink.methods.lowrank._initial import initial

KEY_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
DRAWN = (0.25, 0.5, 0.75, 1.0)  # of the rank, by a step of matryoshka


@final
@dataclass(frozen=True)
class CSKV(Method):
    """Channel shrinking.

    keep:        share of channels, rank over KV width (the paper's 1 - ratio), averaged over keys and values.
    bits:        bits of a stored latent: None (the model's dtype), 8, 4, 3 or 2; with a codec, what that one offers.
    codec:       name of a method of quant/ that stores the latents, at `bits` and else its defaults; None: KIVI's axes.
    init:        "pca" (closed form), or the paper's "asvd", "svd", "random".
    group_heads: KV heads that share one key basis; None: all, as the paper and the most accurate per byte
                 (docs/decisions/006-group-heads.md). Fewer make decoding cheaper; "auto" lets `fit` take the most whose
                 keys are rebuilt no slower than the cache is read, as measured on the device at hand.
    key_share:   share of the kept channels that goes to keys; "auto" lets `fit` choose it layer by layer.
    steps:       optimiser steps of training after `init`, kept if it is better on held-out rows; 0: none.
    loss:        what is trained: "rows" (the paper's layer-wise reconstruction of keys and values), "output" (of the
                 layer's attention output), "kl" (all layers jointly, on the model's predictions).
    qat:         train through the quantiser (needs steps and bits).
    lr:          learning rate of that training, linear decay to 0.
    matryoshka:  train at ranks drawn from a quarter to all, so that `Artifact.at` can leave components out.
    key_metric, value_metric: what init="pca" counts as the error: "plain" (the paper's mean square), "query" (keys
                 weighted by the energy of the queries that read them), "output" (values by the output projection).
    budget:      instead of `keep`: bytes of the body over the full cache's, over all layers; the rank of each layer's
                 keys and of its values is by measured KL of the whole model, which must be in memory. Latents are then
                 stored by `tcq`, each side's at 2, 3 or 4 bits as is best, unless bits or codec say otherwise.
    shards:      ranks of a tensor-parallel server: no basis, of keys or of values, goes beyond one's heads.
    """

    keep: float = 0.2
    bits: int | float | None = None  # a float of a codec that offers it: 1.5
    init: Literal["pca", "asvd", "svd", "random"] = "pca"
    group_heads: int | Literal["auto"] | None = None
    key_share: float | Literal["auto"] = 0.5
    steps: int = 0
    qat: bool = False
    lr: float = 5e-5
    key_metric: Literal["plain", "query"] = "plain"
    value_metric: Literal["plain", "output"] = "plain"
    loss: Literal["rows", "output", "kl"] = "rows"
    matryoshka: bool = False
    codec: str | None = None
    budget: float | None = None
    shards: int = 1

    needs_fit: ClassVar[bool] = True
    byte_neutral: ClassVar[frozenset[str]] = frozenset(METRICS)
    value_group: ClassVar[int] = 64  # latent channels that share a value's scale

    @property
    def budget_setting(self) -> str:  # type: ignore[override] # one of the two, by which is given
        return "keep" if self.budget is None else "budget"

    @property
    def rounds_window(self) -> bool:
        return self.budget is not None

    @property
    def probes(self) -> bool:
        return self.budget is not None

    @property
    def own(self) -> tuple[str | None, int | float | None]:
        """(codec, bits) of the latents; the most bits, where a side has its own."""
        return (_ranked.CODEC, max(self.tried)) if len(self.tried) > 1 else (self.codec, self.bits)

    @property
    def tried(self) -> tuple[Any, ...]:
        """Bits of which each side takes the best: at a budget, where nothing is said of codec and bits."""
        free = self.budget is not None and self.codec is None and self.bits is None
        return _ranked.BITS if free else (self.bits,)

    @classmethod
    def paper(cls, keep: float = 0.2, bits: int | None = 4, steps: int = 12_000) -> "CSKV":
        """The paper's own setting: ASVD, joint heads, window 32, reconstruction training, QAT where bits are few."""
        return cls(keep=keep, bits=bits, init="asvd", window=32, sinks=0, steps=steps, qat=bits is not None)

    def check(self) -> None:
        super().check()
        checked(self)

    def resolve_auto(self, shapes: Sequence[LayerShape], device: torch.device) -> "CSKV":
        """group_heads="auto" as a number, by `_groups` and the speed of `device`.

        The number hardly depends on keep, which moves the rebuild and what is read alike. key_share="auto" counts as
        half.
        """
        if self.group_heads != "auto" or not shapes:
            return self

        def costs(size: int) -> list[Cost]:
            own = replace(self, group_heads=size)
            every = dict.fromkeys(shapes)
            return [Cost(x.width, own.key_rank(x), own.bits_per_token(x, {}) / 8) for x in every]

        heads = [shard_heads(self.shards, shape.heads) for shape in shapes]
        return replace(self, group_heads=heads_per_basis(heads, costs, measure(device, shapes[0].dtype)))

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        if self.budget is not None:
            page = shape.token_bytes * self.page
            return [k / 10_000 for k in range(1, int(10_000 * _ranked.most_bytes(self, shape) / page) + 1)]
        return [channels / shape.width for channels in range(1, shape.width + 1)]

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        heads = math.gcd(*(shape.heads for shape in shapes))
        sizes = (None, *(n for n in range(1, heads) if heads % n == 0))
        return {"bits": (None, 4, 3, 2), "key_share": KEY_SHARES, **METRICS, "group_heads": sizes}

    def splits(self) -> Mapping[float, "CSKV"]:
        return {share: replace(self, key_share=share) for share in KEY_SHARES} if self.key_share == "auto" else {}

    def training(self) -> Training | None:
        if not self.steps:
            return None
        rounds = self.own != (None, None)
        return Training(self.loss, self.steps, self.lr, self.qat, rounds, DRAWN if self.matryoshka else (1.0,))

    def ranks(self, shape: LayerShape, key_share: float | None = None) -> tuple[int, int]:
        """(rank of each key group, rank of each shard's values)."""
        share = key_share if key_share is not None else 0.5 if self.key_share == "auto" else float(self.key_share)
        return _ranks.split(self.keep, share, shape.width, self.groups(shape), self.shards)

    def key_rank(self, shape: LayerShape) -> int:
        """Of each key group; at a budget what it would be if all had the same share."""
        if self.budget is None:
            return self.ranks(shape)[0]
        share = _ranked.page_bytes(self, shape) / _ranked.most_bytes(self, shape)
        return max(1, int(share * shape.width / self.groups(shape)))

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """Basis of keys and values of one layer, before any training."""
        if self.budget is not None:
            return _ranked.start(self, stats)
        rank_k, rank_v = self.ranks(stats.shape)
        groups = self.groups(stats.shape)
        fitted: dict[str, Tensor] = {}
        sides = zip(KVS, (groups, self.shards), (rank_k, rank_v), metrics_of(self, stats), strict=True)
        for kv, bases, rank, metric in sides:
            fitted |= {f"{kv}_{k}": t for k, t in initial(self.init, kv, stats, bases, rank, metric).items()}
        if self.samples:
            for kv in KVS:
                fitted |= latents.learn(self._quantiser(), kv, fitted, stats, self.page)
        return fitted

    @property
    def needs_importance(self) -> bool:
        """Whether its quantiser ranks tokens by their importance."""
        return self.own[0] is not None and self._quantiser().needs_importance

    def policy(self, shape: LayerShape, fitted: Fitted) -> Policy:
        return Policy() if self.own[0] is None else self._quantiser().policy(shape, {})

    def apart(self, fitted: Fitted) -> str | None:
        return None if self.own[0] is None else self._quantiser().apart({})

    @property
    def samples(self) -> bool:
        return self.own[0] is not None and self._quantiser().needs_fit

    def _quantiser(self, kv: KV = "key", fitted: Fitted | None = None) -> Quantiser:
        """What stores the latents. kv, fitted: of that side, where it has bits of its own."""
        (codec, bits), own = self.own, (fitted or {}).get(f"{kv}_bits")
        assert codec is not None
        return latents.quantiser(codec, bits if own is None else int(own))

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        if self.budget is None:
            return super().finish(layers, shapes, probe)
        return _ranked.finish(self, layers, shapes, probe)

    def at_ratio(self, ratio: float) -> "CSKV":
        require(self.budget is None, f"another budget than {self.budget}", "Its ranks are for this one. Fit it again.")
        if ratio > self.keep:
            raise SettingError(f"keep={ratio} is above the artifact's {self.keep}. Components can only be left out.")
        if self.steps and not self.matryoshka:
            raise SettingError("the artifact was trained for one rank only. Fit with matryoshka=True to cut it.")
        return replace(self, keep=ratio)

    def cut(self, fitted: Fitted, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """The share of keys in `record` is the one that key_share="auto" chose."""
        require(not self.samples, f"codec={self.codec!r} at another keep", "It is fitted to one basis. Fit it again.")
        groups, width = fitted["key_mean"].shape[0], fitted["value_mean"].numel()
        heads = groups * (self._settled() or 1)
        ranks = self.ranks(LayerShape(heads, width // heads, torch.float32), record.get("key_share"))
        return {**fitted, **leading(fitted, "key", ranks[0]), **leading(fitted, "value", ranks[1])}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[BasisCodec, BasisCodec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def tiers(self, shape: LayerShape, fitted: Fitted) -> tuple[Tier, ...]:
        pair = self.codecs(shape, fitted)
        return (Tier(pair),) if self.own[0] is None else aged(pair, *self._ladders(shape, fitted))

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        if self.own[0] is None or (self.budget is not None and not fitted):
            return super().body_bytes(shape, fitted, pages)
        return held(self._ladders(shape, fitted), pages, self.page)

    def _ladders(self, shape: LayerShape, fitted: Fitted) -> list[Ladder]:
        """How the quantiser stores latents at each age; without `fitted` as the rank rule promises."""
        if fitted:
            sizes = [(fitted[f"{kv}_up"].shape[0], fitted[f"{kv}_up"].shape[1]) for kv in KVS]
        else:
            sizes = list(zip((self.groups(shape), self.shards), self.ranks(shape), strict=True))
        spaces = [Space(groups, rank, self.page, shape.dtype, False) for groups, rank in sizes]
        return [latents.ladder(self._quantiser(s, fitted), s, x, fitted) for s, x in zip(KVS, spaces, strict=True)]

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """As promised by the rank rule alone where nothing is fitted yet."""
        if fitted:
            return super().bits_per_token(shape, fitted)
        if self.budget is not None:
            return _ranked.page_bytes(self, shape) * 8 / self.page
        parts = zip(KVS, (self.groups(shape), self.shards), self.ranks(shape), strict=True)
        pages = [self.stored(kv, groups, rank, shape.dtype, {}).page_bytes() for kv, groups, rank in parts]
        return sum(pages) * 8 / self.page

    def bases(self, kv: KV, shape: LayerShape) -> int:
        return self.groups(shape) if kv == "key" else self.shards

    def groups(self, shape: LayerShape) -> int:
        """Key bases of a layer. Raises SettingError if group_heads does not divide its heads, or is still "auto"."""
        return bases_of(self._settled(), shape.heads, self.shards)

    def _settled(self) -> int | None:
        if self.group_heads == "auto":
            raise SettingError("group_heads='auto' is a number only after `fit`. Fit the method, or give a number.")
        return self.group_heads

    def _codec(self, kv: KV, shape: LayerShape, fitted: Fitted) -> BasisCodec:
        up, mean = fitted[f"{kv}_up"], fitted[f"{kv}_mean"]
        down = fitted.get(f"{kv}_down", up.transpose(1, 2))
        groups, rank, _ = up.shape
        if self.own[0] is not None:
            quantiser = self._quantiser(kv, fitted)
            down, up, mean = latents.transformed(quantiser, kv, (down, up, mean), fitted, shape.dtype, self.page)
        stored = self.stored(kv, groups, rank, shape.dtype, fitted)
        return BasisCodec("k_pre" if kv == "key" else "v", down, up, mean, stored)

    def stored(self, kv: KV, groups: int, rank: int, dtype: torch.dtype, fitted: Fitted) -> Packing:
        """How latents of a side are packed."""
        codec, bits = self.own
        if codec is not None:
            return latents.packing(
                self._quantiser(kv, fitted), kv, Space(groups, rank, self.page, dtype, False), fitted
            )
        axis = "channel" if kv == "key" else "token"
        return packing(groups, rank, self.page, None if bits is None else int(bits), axis, self.value_group, dtype)


METHOD = CSKV
