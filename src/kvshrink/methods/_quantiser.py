"""What every quantiser is: an invertible change of basis for keys and one for values, then codes in pages.

The same two parts store the keys and values of KV heads and the latents of a low-rank method: the transform folds into
its basis, so that it costs nothing there.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._ladder import Ladder, aged, held
from kvshrink.methods._packing import Packing, packing
from kvshrink.methods._policy import NormalisedAttention, Policy
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import KV, KVS, CalibrationStats, LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.shapes import Float
from kvshrink.store.names import under


@dataclass(frozen=True)
class Space:
    """What a quantiser is asked to store: G groups of `width` channels, in pages of `page` tokens.

    heads: whether the groups are KV heads; else they are latents, whose number must stay as it is.
    """

    groups: int
    width: int
    page: int
    dtype: torch.dtype
    heads: bool


class Transform(NamedTuple):
    """z = (x - mean) @ down and x = z @ up + mean, for G' groups of neighbouring groups of a Space; down @ up = 1."""

    down: Float[Tensor, "G a r"]
    up: Float[Tensor, "G r a"]
    mean: Float[Tensor, "G a"]

    @classmethod
    def rotation(cls, matrix: Float[Tensor, "G a a"]) -> "Transform":
        """By orthogonal matrices: z = x @ matrix."""
        return cls(matrix, matrix.transpose(1, 2), matrix.new_zeros(matrix.shape[:2]))

    @classmethod
    def scaled(cls, scale: Float[Tensor, "G a"], mean: Float[Tensor, "G a"] | None = None) -> "Transform":
        """z = (x - mean) / scale."""
        return cls(
            torch.diag_embed(1 / scale), torch.diag_embed(scale), torch.zeros_like(scale) if mean is None else mean
        )

    @classmethod
    def ordered(cls, order: Tensor) -> "Transform":
        """By permutations [G, a]: z_i = x_order[i]."""
        return cls.rotation(torch.nn.functional.one_hot(order, order.shape[1]).float().transpose(1, 2))

    def forward(self, rows: Float[Tensor, "b h t d"]) -> Float[Tensor, "b G t r"]:
        flat = rows.unflatten(1, (len(self.mean), -1)).transpose(2, 3).flatten(3)
        found: Tensor = (flat - self.mean[:, None]) @ self.down
        return found

    def back(self, latent: Float[Tensor, "b G t r"], groups: int) -> Float[Tensor, "b h t d"]:
        rows = latent @ self.up + self.mean[:, None]
        found: Tensor = rows.unflatten(-1, (groups // len(self.mean), -1)).transpose(2, 3).flatten(1, 2)
        return found

    def to(self, device: torch.device) -> "Transform":
        return Transform(*(t.to(device) for t in self))

    def then(self, other: "Transform") -> "Transform":
        """This one, then another of the same groups."""
        mean = self.mean + (other.mean[:, None] @ self.up)[:, 0]
        return Transform(self.down @ other.down, other.up @ self.up, mean)


def beside_constant(stored: Packing, transform: Transform | None, constant: Float[Tensor, "h d"]) -> BasisCodec:
    """Keys before RoPE less their constant part, so that a step of the codes has the size of what varies."""
    if transform is None:
        transform = Transform.rotation(torch.eye(constant.shape[1], device=constant.device).repeat(len(constant), 1, 1))
    return BasisCodec("k_pre", transform.down, transform.up, transform.mean + constant.view_as(transform.mean), stored)


@dataclass(frozen=True, eq=False)
class SideStats:
    """What a quantiser may learn for keys, or for values.

    rows:   calibration rows as they will be stored.
    metric: what an error e costs: e metric e^T. Of keys the mean squared error of scores, of values that of the layer's
            output.
    energy: mean squared score of each token's key: which values attention reads, by group.
    pairs:  channels that RoPE rotates together before rows are stored; None: none, or rows are stored before RoPE.
    max_abs_query: of keys after RoPE, the largest |q| in each channel; None: no queries are known here.
    """

    rows: Float[Tensor, "m G r"]
    metric: Float[Tensor, "G r r"]
    energy: Float[Tensor, "m G"]
    pairs: tuple[Tensor, Tensor] | None
    max_abs_query: Float[Tensor, "G r"] | None = None

    @cached_property
    def weight(self) -> Float[Tensor, "G r"]:
        """The metric's diagonal: what an error in one channel costs."""
        return self.metric.diagonal(dim1=1, dim2=2)

    def error(self, rows: Float[Tensor, "k G r"]) -> Float[Tensor, ""]:
        """What it costs, relative to the rows' own size, to read the first k rows like this."""
        right = self.rows[: len(rows)].transpose(0, 1)
        wrong = rows.transpose(0, 1) - right
        cost, size = (((x @ self.metric) * x).sum() for x in (wrong, right))
        return cost / size.clamp_min(1e-30)

    def tokens(self, page: int) -> Float[Tensor, "1 G t r"]:
        """Whole pages of the rows, as a packing takes them."""
        whole = len(self.rows) // page * page
        return self.rows[:whole].transpose(0, 1)[None]

    def cost(self, packing: Packing, transform: Transform | None = None) -> float:
        """The error of rows that went through a transform and a packing."""
        rows = self.tokens(packing.page)
        if transform is None:
            back = packing.fake_quantize(rows)
        else:
            back = transform.back(packing.fake_quantize(transform.forward(rows)), rows.shape[1])
        return float(self.error(back[0].transpose(0, 1)))

    @classmethod
    def of(cls, stats: CalibrationStats, kv: KV, site: str) -> "SideStats":
        """Rows of each KV head, at a codec's site."""
        sample = stats.sample
        assert sample is not None, "a method that learns from rows must say so: `samples`"
        heads = stats.shape.heads
        queries = sample.queries_post_rope.unflatten(1, (heads, -1))  # [m, h, members, d]
        moment = torch.einsum("mhqc,mhqd->hcd", queries, queries) / len(queries)
        energy = torch.einsum("mhc,hcd,mhd->mh", sample.keys_post_rope, moment, sample.keys_post_rope)
        if kv == "value":
            return cls(sample.values, stats.known("output_gram").float(), energy, None)
        if site == "k_pre":  # over all distances the two channels of a pair are alike, and pairs do not mix
            return cls(sample.keys_pre_rope, torch.diag_embed(stats.known("query_energy").float()), energy, None)
        return cls(sample.keys_post_rope, moment, energy, stats.pairs, queries.abs().amax((0, 2)))

    def projected(
        self, down: Float[Tensor, "G a r"], up: Float[Tensor, "G r a"], mean: Float[Tensor, "G a"]
    ) -> "SideStats":
        """The latents of a basis, whose groups are groups of these."""
        groups = len(mean)
        rows = self.rows.unflatten(1, (groups, -1)).flatten(2)  # [m, G, a]
        latent = ((rows - mean).transpose(0, 1) @ down).transpose(0, 1)
        joint = torch.stack([torch.block_diag(*part) for part in self.metric.unflatten(0, (groups, -1))])
        return SideStats(latent, up @ joint @ up.transpose(1, 2), self.energy.unflatten(1, (groups, -1)).sum(2), None)


CONSTANT = "key_constant"  # [h, d] in what is fitted: a part of all keys before RoPE that is not stored with them


@dataclass(frozen=True)
class Quantiser(Method):
    """A method that stores every channel in fewer bits."""

    site: ClassVar[Literal["k_pre", "k_post"]] = "k_post"  # where keys are stored: before or after RoPE
    offered: ClassVar[tuple[Any, ...]] = ()  # what `bits` may be, where there is such a setting
    of_latents: ClassVar[bool] = True  # whether it stores a low-rank method's latents too
    two_widths: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.offered:
            one_of("bits", self.settings()["bits"], self.offered)

    def budget_values(self, shape: LayerShape, tokens: int) -> Sequence[Any]:
        return self.offered

    @abstractmethod
    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        """How rows are stored. Its bytes do not depend on what was learnt, which may be nothing yet."""

    def ladder(self, kv: KV, space: Space, learnt: Fitted) -> Ladder:
        """How rows are stored at each age, the youngest first; `packing` by default, for good."""
        return ((self.packing(kv, space, learnt), None),)

    def transform(self, kv: KV, space: Space, learnt: Fitted) -> Transform | None:
        """What is done to rows before they are stored; None: nothing."""
        return None

    def learn(self, kv: KV, stats: SideStats, space: Space) -> dict[str, Tensor]:
        """Tensors of keys or of values. Called only where `needs_fit`."""
        return {}

    @property
    def samples(self) -> bool:
        return self.needs_fit

    @property
    def needs_importance(self) -> bool:
        """Whether one of its packings ranks tokens by their importance."""
        some = Space(1, 64, self.page, torch.float32, True)
        return any(self.packing(kv, some, {}).needs_importance for kv in KVS)

    def policy(self, shape: LayerShape, fitted: Fitted) -> Policy:
        return Policy(NormalisedAttention() if self.needs_importance else None)

    def apart(self, fitted: Fitted) -> str | None:
        some = Space(1, 64, self.page, torch.float32, True)
        aged = any(len(self.ladder(kv, some, {})) > 1 for kv in KVS)
        own = (
            "ranks tokens by the attention they get"
            if self.needs_importance
            else "stores tokens by their age"
            if aged
            else None
        )
        return super().apart(fitted) or own

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        if not self.needs_fit:
            return {}
        constant = stats.large_constant()
        if constant is None:
            sides = {kv: SideStats.of(stats, kv, self.site) for kv in KVS}
        else:
            sides = {kv: SideStats.of(stats.less(constant), kv, "k_pre") for kv in KVS}
        found = {kv: self.learn(kv, sides[kv], self._space(stats.shape, kv)) for kv in KVS}
        learnt = {f"{kv}_{k}": t.contiguous() for kv in KVS for k, t in found[kv].items()}
        return learnt if constant is None else learnt | {CONSTANT: constant.float().contiguous()}

    def without_constant(self, fitted: Fitted, constant: Tensor) -> Fitted | None:
        own = type(self).codecs is Quantiser.codecs and not self.needs_fit  # a fit has seen the constant
        return {**fitted, CONSTANT: constant} if own else None

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def tiers(self, shape: LayerShape, fitted: Fitted) -> tuple[Tier, ...]:
        ladders = [self.ladder(kv, self._space(shape, kv), prefixed(fitted, kv)) for kv in KVS]
        return aged(self.codecs(shape, fitted), *ladders)

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        ladders = [self.ladder(kv, self._space(shape, kv), {}) for kv in KVS]
        if len(ladders[0]) == 1:
            return super().body_bytes(shape, fitted, pages)
        return held(ladders, pages, self.page)

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The same before a fit and after it."""
        return sum(self.packing(kv, self._space(shape, kv), {}).page_bytes() for kv in KVS) * 8 / self.page

    def lane_groups(self, shape: LayerShape) -> int:
        if type(self).codecs is not Quantiser.codecs:
            return 1
        return gcd(*(self.packing(kv, self._space(shape, kv), {}).groups for kv in KVS))

    def _codec(self, kv: KV, shape: LayerShape, fitted: Fitted) -> Codec:
        space, learnt = self._space(shape, kv), prefixed(fitted, kv)
        stored, transform = self.packing(kv, space, learnt), self.transform(kv, space, learnt)
        constant = fitted.get(CONSTANT) if kv == "key" else None
        turns = self.site == "k_post" and not self.needs_fit and (transform is None or not transform.mean.any())
        if constant is not None and not turns:
            return beside_constant(stored, transform, constant)
        site = self.site if kv == "key" else "v"
        if transform is None:
            return HeadwiseCodec(site, stored, constant)
        return BasisCodec(site, *transform, stored, constant)

    def _space(self, shape: LayerShape, kv: KV) -> Space:
        width = shape.head_dim if kv == "key" else shape.value_dim
        return Space(shape.heads, width, self.page, shape.dtype, True)


def axes(space: Space, bits: int | None, axis: str, group: int) -> Packing:
    """Floats for bits=None, else affine codes on an axis."""
    return packing(space.groups, space.width, space.page, bits, axis, group, space.dtype)


def prefixed(fitted: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return under(fitted, f"{prefix}_")
