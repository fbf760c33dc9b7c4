"""What a method may learn from: a layer's shape, its statistics on the calibration text, and a probe of the model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvshrink.errors import UnsupportedModelError
from kvshrink.methods._codec import Codec
from kvshrink.methods._token_probe import TokenProbe
from kvshrink.shapes import Float

T = TypeVar("T")
KV = Literal["key", "value"]
KVS: tuple[KV, KV] = ("key", "value")
LARGE = 8  # a constant part to what varies beside it, from which on it is kept apart, as Qwen2's key biases must be


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer's cache: h KV heads of d channels, stored by the model as dtype.

    swamped: whether keys have biases so large that 8 bits of a token would go to them, as Qwen2's.
    """

    heads: int
    head_dim: int
    dtype: torch.dtype
    swamped: bool = False
    value_channels: int | None = None  # of a value's row, where they are not head_dim (MLA)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.value_channels is None else self.value_channels

    @property
    def numbers(self) -> int:
        """Of a token's key and value."""
        return self.heads * (self.head_dim + self.value_dim)

    @property
    def one_width(self) -> bool:
        return self.value_dim == self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in a full cache."""
        return self.numbers * self.dtype.itemsize


SOME = LayerShape(1, 64, torch.float32)  # where what is asked does not depend on it


@dataclass(frozen=True)
class Moments:
    """Moments of the calibration rows of one site: mean [n], covariance [n, n], over `count` tokens."""

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Sample:
    """Some tokens of the calibration text, the same for all fields, spread evenly over it; float32.

    post_rope: as attention uses them.
    """

    keys_pre_rope: Float[Tensor, "m h d"]
    keys_post_rope: Float[Tensor, "m h d"]
    values: Float[Tensor, "m h d"]
    queries_post_rope: Float[Tensor, "m q d"]
    queries_pre_rope: Float[Tensor, "m q d"]


@dataclass(frozen=True)
class CalibrationStats:
    """What a method may learn a layer's settings from. Weights are [n, hidden]; input_scale is mean |x| per channel.
    What a model does not show is None: see `known`.

    query_energy: mean q^2 over the calibration tokens, summed over the query heads that read a KV head and averaged
                  over the two channels of a RoPE pair (a rotation to any position then leaves it as it is).
    output_gram:  sum over the query heads of a KV head of W_O^T W_O: what an error in that head's values costs.
    pairs:        (first, second) channel of each pair that RoPE rotates; None: the layer has no RoPE.
    sample:       rows as they are, where the method asks for them (`Method.samples`).
    key_bias:     of the projections [n], before a norm on keys; None: they have none.
    """

    shape: LayerShape
    key: Moments
    value: Moments
    input_scale: Tensor
    key_weight: Tensor | None
    value_weight: Tensor | None
    query_energy: Float[Tensor, "h d"] | None
    output_gram: Float[Tensor, "h d d"] | None
    pairs: tuple[Tensor, Tensor] | None = None
    sample: Sample | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None

    def known(self, name: str) -> Tensor:
        """One of these. Raises UnsupportedModelError if the model does not show it."""
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise UnsupportedModelError(
                f"this model does not show its {name.replace('_', ' ')}, which the method learns from. Use one that "
                "learns from keys and values alone, such as spectral or cskv."
            )
        return found

    def large_constant(self) -> Float[Tensor, "h d"] | None:
        """The mean of keys before RoPE, where some channel's is LARGE times what varies in an average one."""
        spread = self.key.covariance.diagonal().clamp_min(0).sqrt().mean()
        large = bool(self.key.mean.abs().max() >= LARGE * spread)
        return self.key.mean.view(self.shape.heads, -1) if large else None

    def less(self, constant: Float[Tensor, "h d"]) -> "CalibrationStats":
        """The same of keys before RoPE without their constant part; those after RoPE stay as they are."""
        moments = replace(self.key, mean=self.key.mean - constant.flatten())
        sample = self.sample and replace(self.sample, keys_pre_rope=self.sample.keys_pre_rope - constant.float())
        return replace(self, key=moments, sample=sample)


class Parts(NamedTuple):
    """kl: of the predictions, in nats; of: {(layer, "key" or "value"): its part, over the whole}."""

    kl: float
    of: Mapping[tuple[int, KV], float]


class Probe(ABC):
    """Asks the whole model what a loss costs."""

    @abstractmethod
    def parts(self, codecs: Mapping[int, tuple[Codec | None, Codec | None]], turn: int) -> Parts:
        """KL of what is read so, and whose it is. turn: each is measured on other rows."""

    @abstractmethod
    def near(self, budget: float) -> float:
        """The budget whose answers are those of this one: itself, unless a search may be rough."""

    @abstractmethod
    def once(self, key: Hashable, measure: Callable[[], T]) -> T:
        """What `measure` gives, remembered by a key of the method's own: methods fitted together share answers."""

    @property
    @abstractmethod
    def tokens(self) -> TokenProbe:
        """What it asks about heads and tokens."""

    @abstractmethod
    def fisher(self) -> dict[int, tuple[float, float]]:
        """Per layer, squared gradients of a loss summed over the weights that make its keys, and its values."""
