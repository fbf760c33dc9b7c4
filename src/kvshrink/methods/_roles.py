"""What a method is made of. A method file fills these roles; the cache knows only the roles.

Abstract or final: a role is never instantiated, a method is never subclassed. Methods are frozen: settings, plus
tensors fitted once. Per-sequence state lives in the cache layer. A role joins this file with its first method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.shapes import Bool, Float

Stored = Mapping[str, Tensor]  # every tensor is [b, p, ...]
Fitted = Mapping[str, Tensor]  # what `fit` learnt about one layer


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer's cache: h KV heads of d channels, stored by the model as dtype."""

    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in a full cache."""
        return 2 * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Moments:
    """Moments of the calibration rows of one site: mean [n], covariance [n, n], over `count` tokens."""

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class LayerFacts:
    """What a method may learn a layer's settings from. Weights are [n, hidden]; input_scale is mean |x| per channel.

    query_energy: mean q^2 over the calibration tokens, summed over the query heads that read a KV head and averaged
                  over the two channels of a RoPE pair (a rotation to any position then leaves it as it is).
    output_gram:  sum over the query heads of a KV head of W_O^T W_O: what an error in that head's values costs.
    """

    shape: LayerShape
    key: Moments
    value: Moments
    input_scale: Tensor
    key_weight: Tensor
    value_weight: Tensor
    query_energy: Float[Tensor, "h d"]
    output_gram: Float[Tensor, "h d d"]
    pairs: tuple[Tensor, Tensor] | None = None  # channels of a head that RoPE turns together, first and second


class Probe(ABC):
    """Asks the whole model what a loss costs."""

    @abstractmethod
    def kl(self, codecs: Mapping[int, tuple["Codec | None", "Codec | None"]]) -> float:
        """Mean KL of the model's predictions, in nats, where these layers' keys and values are read through codecs
        (None: exactly), window and sinks as the method has them. Layers without an entry are exact."""

    @abstractmethod
    def once(self, key: Hashable, measure: Callable[[], float]) -> float:
        """What `measure` gives, remembered by a key of the method's own: methods fitted together share answers."""

    @abstractmethod
    def fisher(self) -> dict[int, tuple[float, float]]:
        """Per layer, squared gradients of a loss summed over the weights that make its keys, and its values."""


class Codec(ABC):
    """Rows of one site <-> stored pages. `decode` is `expand(unpack(stored))`: the second half is linear, so that
    values can stay latent until after the softmax-weighted sum.

    site:  "k_pre" keys before RoPE, "k_post" keys as attention uses them, "v" values.
    side:  names of the stored tensors that are side information (scales, minima), not payload.
    width: channels of one group's latent, what `unpack` gives.
    """

    site: Literal["k_pre", "k_post", "v"]
    side: frozenset[str]
    width: int

    @abstractmethod
    def encode(self, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        """Whole pages of rows, encoded. Invalid rows (left pads) may hold anything and must not matter."""

    @abstractmethod
    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        """Latents of G groups of KV heads, float32."""

    @abstractmethod
    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        """Rows from latents, H = G (tokens of each group) or H = h (weighted sums of each KV head), heads = h."""

    @abstractmethod
    def page_bytes(self) -> int:
        """Bytes of one stored page, by arithmetic. The contract test holds it against the tensors."""

    def decode(self, stored: Stored, heads: int) -> Float[Tensor, "b h t d"]:
        return self.expand(self.unpack(stored), heads)

    def __deepcopy__(self, memo: dict) -> "Codec":
        return self  # settings and fitted tensors are shared by all sequences, also by a copied cache


@dataclass(frozen=True)
class Method(ABC):
    """A way to shrink the cache. The last `window` and the first `sinks` tokens of a sequence are always exact.

    Tokens leave the window in pages of `page`; `codecs` says what becomes of them, None that they are dropped.
    """

    window: int = 32
    sinks: int = 4

    page: ClassVar[int] = 32
    needs_fit: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = False
    dial: ClassVar[str | None] = None  # the setting that a byte budget moves

    def dial_values(self, shape: LayerShape, tokens: int) -> Sequence:
        """Values of the dial for a cache of `tokens` tokens, the one with the fewest bytes first."""
        return ()

    @abstractmethod
    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec] | None:
        """Key codec and value codec of a layer of this shape."""

    def fit_layer(self, facts: LayerFacts) -> dict[str, Tensor]:
        """Tensors of one layer from its calibration statistics."""
        return {}

    @property
    def probes(self) -> bool:
        """Whether `finish` needs a Probe, and so the whole model in memory."""
        return False

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict]:
        """Once all are fitted: what they share, as one byte budget. (tensors, record; "layers" in it joins theirs)."""
        return {i: dict(fitted) for i, fitted in layers.items()}, {}

    def check(self) -> None:
        """Raise SettingError on settings that no model could use."""
        whole("window", self.window)
        whole("sinks", self.sinks)
        require(self.window >= 1, f"window={self.window}", "Use at least 1 token.")
        require(self.sinks >= 0, f"sinks={self.sinks}", "Use 0 or more tokens.")

    def __post_init__(self) -> None:
        self.check()

    def settings(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """Bits of a token's key and value in the body, scales included, window and sinks not. 0 if dropped."""
        pair = self.codecs(shape, fitted)
        return 0.0 if pair is None else sum(c.page_bytes() for c in pair) * 8 / self.page

    def layer_bytes(self, shape: LayerShape, fitted: Fitted, tokens: int, batch: int = 1) -> int:
        """Bytes a layer holds after one prefill of `tokens` unpadded tokens. The cache must hold exactly this."""
        window = (self.window + self.page) * shape.token_bytes
        pages = max(0, tokens - self.sinks - self.window) // self.page if tokens > self.window + self.page else 0
        if tokens <= self.window + self.page:
            return batch * window
        sinks = self.sinks * (shape.token_bytes + 4)  # and a 4-byte column each
        return batch * (window + sinks + int(pages * self.bits_per_token(shape, fitted) * self.page / 8))


def whole(name: str, value: object) -> None:
    """Raise SettingError unless the value is an int, or None where a setting may be left out."""
    require(value is None or type(value) is int, f"{name}={value!r}", "Use a whole number.")


def number(name: str, value: object) -> None:
    """Raise SettingError unless the value is a number."""
    require(type(value) in (int, float), f"{name}={value!r}", "Use a number.")


def require(ok: bool, what: str, remedy: str) -> None:
    """Raise SettingError unless ok."""
    if not ok:
        raise SettingError(f"{what} is not possible. {remedy}")
