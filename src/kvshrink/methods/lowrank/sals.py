"""SALS: attention to the tokens that score highest in latent space. arXiv 2510.24273 (and xKV-SR, arXiv 2503.18893)

Keys are low-rank latents of all heads, before RoPE, as CSKV's. A new token first scores every latent without RoPE: its
queries, RoPE undone and absorbed by the basis, times the leading components. Only the `topk` best tokens of the body
then have their keys rebuilt with RoPE and are attended to; the exact window and the sinks always are. That saves reads
and work, never bytes: all latents stay held, as many as CSKV holds. Several new tokens at once (a prompt's
chunks, a later turn, drafts) attend to all, and so does another attention implementation.

One choice per layer: scores are summed over all query heads, as a product of the joint latent with the joint query is.
Departures from the paper: values are low-rank latents as CSKV's; rows are centred, which shifts all scores of a step
alike; every layer is treated the same; sinks and 32 to 64 recent tokens are exact.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.kernels.decode import Basis
from kvshrink.kernels.latents import Packed
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing.base import Importance
from kvshrink.methods._roles import Codec, Fitted, Method, Stored
from kvshrink.methods._settings import check_topk, reads_part, require
from kvshrink.methods._stats import CalibrationStats, LayerShape
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.shapes import Bool, Float, Int


@final
@dataclass(frozen=True, eq=False)
class ChoosingCodec(Codec):
    """A basis of all heads, of which the `leading` first components choose what is read."""

    basis: BasisCodec
    topk: int | float
    leading: int
    site = "k_pre"
    metadata = frozenset({"scale", "low"})

    @property
    def width(self) -> int:
        return self.basis.width

    def to(self, device: torch.device) -> "ChoosingCodec":
        return replace(self, basis=self.basis.to(device))

    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        return self.basis.encode(rows, valid, importance, base)

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        return self.basis.unpack(stored)

    def sound(self, stored: Stored) -> bool:
        return self.basis.sound(stored)

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        return self.basis.pick(stored, tokens)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return self.basis.expand(latent, heads)

    def packed(self, stored: Stored) -> Packed | None:
        return self.basis.packed(stored)

    @property
    def expansion(self) -> Basis | None:
        return self.basis.expansion

    def page_bytes(self) -> int:
        return self.basis.page_bytes()

    def reads(self, tokens: int) -> int | None:
        if isinstance(self.topk, float):
            return math.ceil(self.topk * tokens)
        return self.topk if self.topk < tokens else None

    def scores(self, query: Float[Tensor, "b h x d"], stored: Stored) -> Float[Tensor, "b t"]:
        """Sum over the query heads of q . k, the part of the leading components, but for a constant."""
        up = self.basis.up[0, : self.leading]
        absorbed = query.sum(2).flatten(1) @ up.T
        return (self.basis.packing.lead(stored, self.leading)[:, 0] @ absorbed[:, :, None])[:, :, 0]


@final
@dataclass(frozen=True)
class SALS(Method):
    """CSKV's latents, of which a new token reads a part.

    keep, bits: as CSKV's, with all heads in one basis of keys.
    topk:       tokens of the body that a step reads per layer, or their share as a decimal number (1.0: all).
    score_rank: share of a key's latent components that choose them, the leading ones.
    """

    keep: float = 0.2
    bits: int | None = None
    topk: int | float = 0.125
    score_rank: float = 0.5

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"

    def check(self) -> None:
        super().check()
        check_topk(self.topk)
        require(0 < self.score_rank <= 1, f"score_rank={self.score_rank}", "Use a share above 0, up to 1.")
        self.cskv.check()

    def apart(self, fitted: Fitted) -> str | None:
        return reads_part(self.topk)

    @property
    def cskv(self) -> CSKV:
        """The method that stores what this one reads."""
        return CSKV(window=self.window, sinks=self.sinks, keep=self.keep, bits=self.bits)

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return self.cskv.budget_values(shape, tokens)

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        return self.cskv.fit_layer(stats)

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        key, value = self.cskv.codecs(shape, fitted)
        assert isinstance(key, BasisCodec)
        return ChoosingCodec(key, self.topk, max(1, int(self.score_rank * key.width))), value

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        return self.cskv.bits_per_token(shape, fitted)


METHOD = SALS
