"""CSKV: channel shrinking for the KV cache. arXiv 2409.10593

Keep a low-rank latent of every key and value and the recent tokens exact beside it. Keys are latent before RoPE and
rebuilt a block at a time; values stay latent until after the softmax-weighted sum. Latents may be quantised: keys per
channel over a page of 32 tokens, values per token; or as a method of quant/ stores them (`codec`), whose change of
basis folds into this one.

Departures from the paper: the basis is found in closed form by default (the optimum of the paper's own loss); the
encoder reads the key, not the layer input, so biases and q/k norms are no obstacle; rows are centred; 4 sinks are
exact; the zero point is a float (the official one is clamped); between 32 and 64 recent tokens are exact, not 1 to 32.
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
from kvshrink.methods._codecs.basis import (
    METRICS,
    BasisCodec,
    leading,
    metrics_of,
    orthonormal,
    principal,
    weighted_svd,
)
from kvshrink.methods._packing import Packing, packing
from kvshrink.methods._policy import Scorer
from kvshrink.methods._quantiser import Ladder, Quantiser, Space, aged, held
from kvshrink.methods._roles import Fitted, Method
from kvshrink.methods._settings import keep_and_bits, require
from kvshrink.methods._stats import KV, KVS, CalibrationStats, LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.methods._training import Training
from kvshrink.methods.lowrank._groups import Cost, bases_of, heads_per_basis

ALPHA = 0.5  # ASVD's exponent on mean |x|
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

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"
    byte_neutral: ClassVar[frozenset[str]] = frozenset(METRICS)
    value_group: ClassVar[int] = 64  # latent channels that share a value's scale

    @classmethod
    def paper(cls, keep: float = 0.2, bits: int | None = 4, steps: int = 12_000) -> "CSKV":
        """The paper's own setting: ASVD, joint heads, window 32, reconstruction training, QAT where bits are few."""
        return cls(keep=keep, bits=bits, init="asvd", window=32, sinks=0, steps=steps, qat=bits is not None)

    def check(self) -> None:
        super().check()
        heads = self.group_heads
        if heads != "auto":
            require(heads is None or heads >= 1, f"group_heads={heads}", "Use 1 or more, 'auto', or None for all.")
        keep_and_bits(self.keep, None if self.codec else self.bits)
        share = self.key_share
        ok = share == "auto" if isinstance(share, str) else isinstance(share, float) and 0 < share < 1
        require(ok, f"key_share={share!r}", "Use a share between 0 and 1, or 'auto'.")
        for name in ("key_metric", "value_metric"):
            metric = getattr(self, name)
            require(metric == "plain" or self.init == "pca", f"{name}={metric!r} with init={self.init!r}", "Use 'pca'.")
        require(self.steps >= 0 and self.lr > 0, f"steps={self.steps}, lr={self.lr}", "Use steps >= 0 and lr > 0.")
        rounds = self.bits is not None or self.codec is not None
        require(not self.qat or (self.steps > 0 and rounds), "qat=True without steps and bits", "Set both.")
        require(self.loss == "rows" or self.steps > 0, f"loss={self.loss!r} without steps", "Set steps.")
        require(not self.matryoshka or self.steps > 0, "matryoshka=True without steps", "Set steps.")
        if self.codec is not None:
            own = latents.quantiser(self.codec, self.bits)
            why, given = own.apart({}), f"codec={self.codec!r} with"
            require(not (own.needs_fit and self.steps), f"{given} steps", "It depends on the basis. Use steps=0.")
            require(not (why and self.steps), f"{given} steps", f"It {why}. Use steps=0.")
            require(not (why and self.key_share == "auto"), f"{given} key_share='auto'", f"It {why}. Give a share.")

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
            return [Cost(x.width, own.ranks(x)[0], own.bits_per_token(x, {}) / 8) for x in every]

        heads = [shape.heads for shape in shapes]
        return replace(self, group_heads=heads_per_basis(heads, costs, measure(device, shapes[0].dtype)))

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
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
        rounds = self.bits is not None or self.codec is not None
        return Training(self.loss, self.steps, self.lr, self.qat, rounds, DRAWN if self.matryoshka else (1.0,))

    def ranks(self, shape: LayerShape, key_share: float | None = None) -> tuple[int, int]:
        """(rank of each key group, rank of values): the one place where channels are rounded, down.

        2 * keep * n channels are shared out; what keys or values cannot take (they have only n) goes to the other.
        """
        share = key_share if key_share is not None else 0.5 if self.key_share == "auto" else float(self.key_share)
        n, total = shape.width, 2 * self.keep * shape.width
        key = min(max(total * share, total - n), n)
        groups = self.groups(shape)
        rank_k, rank_v = int(key / groups + 1e-6), int(total - key + 1e-6)
        if rank_k < 1 or rank_v < 1:
            least = max(groups / share, 1 / (1 - share)) / (2 * n)
            scale = 10 ** (2 - math.floor(math.log10(least)))  # three digits, rounded up so that they are enough
            raise SettingError(
                f"keep={self.keep} with key_share={share} gives key rank {rank_k} and value rank {rank_v} "
                f"of {n} channels. Use keep of at least {math.ceil(least * scale - 1e-6) / scale:g}."
            )
        return rank_k, rank_v

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """Basis of keys and values of one layer, before any training."""
        rank_k, rank_v = self.ranks(stats.shape)
        groups = self.groups(stats.shape)
        fitted: dict[str, Tensor] = {}
        sides = zip(KVS, (groups, 1), (rank_k, rank_v), metrics_of(self, stats), strict=True)
        for kv, bases, rank, metric in sides:
            fitted |= {f"{kv}_{k}": t for k, t in self._side(kv, stats, bases, rank, metric).items()}
        if self.samples:
            for kv in KVS:
                fitted |= latents.learn(self._quantiser(), kv, fitted, stats, self.page)
        return fitted

    @property
    def needs_importance(self) -> bool:
        """Whether its quantiser ranks tokens by their importance."""
        return self.codec is not None and self._quantiser().needs_importance

    @property
    def scorer(self) -> Scorer | None:
        return None if self.codec is None else self._quantiser().scorer

    def apart(self, fitted: Fitted) -> str | None:
        return None if self.codec is None else self._quantiser().apart({})

    @property
    def samples(self) -> bool:
        return self.codec is not None and self._quantiser().needs_fit

    def _quantiser(self) -> Quantiser:
        assert self.codec is not None
        return latents.quantiser(self.codec, self.bits)

    def at_ratio(self, ratio: float) -> "CSKV":
        if ratio > self.keep:
            raise SettingError(f"keep={ratio} is above the artifact's {self.keep}. Components can only be left out.")
        if self.steps and not self.matryoshka:
            raise SettingError("the artifact was trained for one rank only. Fit with matryoshka=True to cut it.")
        return replace(self, keep=ratio)

    def cut(self, fitted: Fitted, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """The share of keys in `record` is the one that key_share="auto" chose."""
        require(not self.samples, f"codec={self.codec!r} at another keep", "It is fitted to one basis. Fit it again.")
        groups, width = fitted["key_mean"].shape[0], fitted["value_mean"].shape[1]
        heads = groups * (self._settled() or 1)
        ranks = self.ranks(LayerShape(heads, width // heads, torch.float32), record.get("key_share"))
        return {**fitted, **leading(fitted, "key", ranks[0]), **leading(fitted, "value", ranks[1])}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[BasisCodec, BasisCodec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def tiers(self, shape: LayerShape, fitted: Fitted) -> tuple[Tier, ...]:
        pair = self.codecs(shape, fitted)
        return (Tier(pair),) if self.codec is None else aged(pair, *self._ladders(shape, fitted))

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        if self.codec is None:
            return super().body_bytes(shape, fitted, pages)
        return held(self._ladders(shape, fitted), pages, self.page)

    def _ladders(self, shape: LayerShape, fitted: Fitted) -> list[Ladder]:
        """How the quantiser stores latents at each age; without `fitted` as the rank rule promises."""
        if fitted:
            sizes = [(fitted[f"{kv}_up"].shape[0], fitted[f"{kv}_up"].shape[1]) for kv in KVS]
        else:
            sizes = list(zip((self.groups(shape), 1), self.ranks(shape), strict=True))
        spaces = [Space(groups, rank, self.page, shape.dtype, False) for groups, rank in sizes]
        return [latents.ladder(self._quantiser(), s, space, fitted) for s, space in zip(KVS, spaces, strict=True)]

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """As promised by the rank rule alone where nothing is fitted yet."""
        if fitted:
            return super().bits_per_token(shape, fitted)
        parts = zip(KVS, (self.groups(shape), 1), self.ranks(shape), strict=True)
        pages = [self._packing(kv, groups, rank, shape.dtype, {}).page_bytes() for kv, groups, rank in parts]
        return sum(pages) * 8 / self.page

    def groups(self, shape: LayerShape) -> int:
        """Key bases of a layer. Raises SettingError if group_heads does not divide its heads, or is still "auto"."""
        return bases_of(self._settled(), shape.heads)

    def _settled(self) -> int | None:
        if self.group_heads == "auto":
            raise SettingError("group_heads='auto' is a number only after `fit`. Fit the method, or give a number.")
        return self.group_heads

    def _side(
        self, kv: KV, stats: CalibrationStats, groups: int, rank: int, metric: Tensor | None
    ) -> dict[str, Tensor]:
        moments, weight, input_scale = getattr(stats, kv), getattr(stats, f"{kv}_weight"), stats.input_scale
        mean = moments.mean.double().unflatten(0, (groups, -1))
        down = None
        if self.init == "pca":
            down, up = principal(moments.covariance, groups, rank, metric)
            down = None if metric is None else down  # an orthonormal basis is stored once
        elif self.init == "random":
            up = orthonormal(groups, mean.shape[1], rank, KVS.index(kv)).to(mean.device)
        else:
            scale = input_scale.double().add(1e-6).pow(ALPHA) if self.init == "asvd" else torch.ones_like(input_scale)
            down, up = weighted_svd(weight, scale, groups, rank)
            mean = torch.zeros_like(mean)  # the paper's factors have no bias
        tensors = {"up": up, "mean": mean} | ({} if down is None else {"down": down})
        return {k: t.float().contiguous() for k, t in tensors.items()}

    def _codec(self, kv: KV, shape: LayerShape, fitted: Fitted) -> BasisCodec:
        up, mean = fitted[f"{kv}_up"], fitted[f"{kv}_mean"]
        down = fitted.get(f"{kv}_down", up.transpose(1, 2))
        groups, rank, _ = up.shape
        if self.codec is not None:
            down, up, mean = latents.transformed(
                self._quantiser(), kv, (down, up, mean), fitted, shape.dtype, self.page
            )
        stored = self._packing(kv, groups, rank, shape.dtype, fitted)
        return BasisCodec("k_pre" if kv == "key" else "v", down, up, mean, stored)

    def _packing(self, kv: KV, groups: int, rank: int, dtype: torch.dtype, fitted: Fitted) -> Packing:
        if self.codec is not None:
            return latents.packing(self._quantiser(), kv, Space(groups, rank, self.page, dtype, False), fitted)
        axis = "channel" if kv == "key" else "token"
        bits = None if self.bits is None else int(self.bits)
        return packing(groups, rank, self.page, bits, axis, self.value_group, dtype)


METHOD = CSKV
