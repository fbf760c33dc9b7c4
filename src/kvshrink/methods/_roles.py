"""What a method is made of. A method file fills these roles; the cache knows only the roles.

Abstract or final: a role is never instantiated, a method is never subclassed. Methods are frozen: settings, plus
tensors fitted once. Per-sequence state lives in the cache layer. A role joins this file with its first method.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvshrink.kernels.decode import Basis
from kvshrink.kernels.latents import Packed
from kvshrink.methods._facts import LayerFacts, LayerShape, Probe
from kvshrink.methods._packing.base import Stored
from kvshrink.methods._settings import EXACT, require
from kvshrink.methods._tier import Tier
from kvshrink.methods._types import check_type, hints
from kvshrink.shapes import Bool, Float, Int

Fitted = Mapping[str, Tensor]  # what `fit` learnt about one layer


class Codec(ABC):
    """Rows of one site <-> stored pages. `decode` is `expand(unpack(stored))`: the second half is linear, so that
    values can stay latent until after the softmax-weighted sum.

    site:  "k_pre" keys before RoPE, "k_post" keys as attention uses them, "v" values.
    side:  names of the stored tensors that are side information (scales, minima), not payload.
    width: channels of one group's latent, what `unpack` gives.
    joint: keys and values are stored as one: the key codec gets the rows of both, 2h heads, and the value codec reads
           what it stored.
    Of a layer that follows another one (`Method.follows`) what is stored holds that one's tensors too, as "base.*".
    """

    site: Literal["k_pre", "k_post", "v"]
    side: frozenset[str]
    width: int
    joint: bool = False

    @abstractmethod
    def encode(self, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        """Whole pages of rows, encoded. Invalid rows (left pads) may hold anything and must not matter."""

    def encode_after(self, base: Stored, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None) -> Stored:
        """`encode` of a layer that follows another one, whose pages of the same tokens are `base`."""
        raise NotImplementedError(f"{type(self).__name__} follows none")

    @property
    def salient(self) -> bool:
        """Whether it wants to know what tokens are worth; only then is it worked out."""
        return False

    def encode_by_worth(
        self, rows: Float[Tensor, "b h t d"], valid: Bool[Tensor, "b t"] | None, worth: Float[Tensor, "b h t"]
    ) -> Stored:
        """As `encode`, which takes all tokens to be worth the same. A codec that is not `salient` does not look."""
        return self.encode(rows, valid)

    @abstractmethod
    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        """Latents of G groups of KV heads, float32."""

    @abstractmethod
    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        """Rows from latents, H = G (tokens of each group) or H = h (weighted sums of each KV head), heads = h."""

    @abstractmethod
    def page_bytes(self) -> int:
        """Bytes of one stored page, by arithmetic. The contract test holds it against the tensors."""

    def absorb(self, query: Float[Tensor, "b h x d"]) -> Float[Tensor, "b h x r"] | None:
        """Queries whose product with the latents of "k_post" keys is their score; None: keys are rebuilt."""
        return None

    def packed(self, stored: Stored) -> Packed | None:
        """The same pages as fused kernels read them; None: `unpack` alone can."""
        return None

    @property
    def expansion(self) -> Basis | None:
        """How a fused kernel rebuilds keys from latents; None: latents are keys, or `absorb` makes queries fit them."""
        return None

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """What `unpack` gives, for some tokens of each row."""
        return self.unpack(stored).take_along_dim(tokens[:, None, :, None], 2)

    def reads(self, tokens: int) -> int | None:
        """How many of the body's tokens a single new token reads, those of the highest `scores`; None: all."""
        return None

    def scores(self, query: Float[Tensor, "b h x d"], stored: Stored) -> Float[Tensor, "b t"]:
        """What chooses the tokens that are read. Asked only of a codec whose `reads` gives a number."""
        raise NotImplementedError(f"{type(self).__name__} has all tokens read")

    def demoted(self, stored: Stored) -> Stored:
        """Pages of the next younger tier as this codec stores them: a part of the same tensors, nothing rounded again.
        Asked only of a codec of an older tier."""
        raise NotImplementedError(f"{type(self).__name__} takes over no pages")

    def sound(self, stored: Stored) -> bool:
        """Whether tensors of the right shapes, which come from a file, hold no place outside of what they index."""
        return True

    def decode(self, stored: Stored, heads: int) -> Float[Tensor, "b h t d"]:
        return self.expand(self.unpack(stored), heads)

    def __deepcopy__(self, memo: dict) -> "Codec":
        return self  # settings and fitted tensors are shared by all sequences, also by a copied cache


@dataclass(frozen=True)
class Method(ABC):
    """A way to shrink the cache. The last `window` and the first `sinks` tokens of a sequence are always exact. Tokens
    leave the window in pages of `page`; `codecs` says what becomes of them, None that they are dropped, and `tiers`
    what becomes of pages that grow old: what a tier cannot hold any more moves on to the next one."""

    window: int = 32
    sinks: int = 4

    page: ClassVar[int] = 32
    needs_fit: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = False
    dial: ClassVar[str | None] = None  # the setting that a byte budget moves

    def dial_values(self, shape: LayerShape, tokens: int) -> Sequence:
        """Values of the dial for a cache of `tokens` tokens, the one with the fewest bytes first."""
        return ()

    def settle(self, shapes: Sequence[LayerShape], device: torch.device) -> "Method":
        """The method with what depends on the device decided, before a fit, so that an artifact means the same on
        every machine. shapes: of the layers that are compressed."""
        return self

    @abstractmethod
    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec] | None:
        """Key codec and value codec of a layer of this shape."""

    def tiers(self, shape: LayerShape, fitted: Fitted) -> tuple[Tier, ...]:
        """Ages of the body's pages, the youngest first, whose codecs are `codecs`."""
        return (Tier(self.codecs(shape, fitted)),)

    def follows(self, fitted: Fitted) -> bool:
        """Whether a layer is stored as what it adds to the compressed layer before it."""
        return False

    def apart(self, fitted: Fitted) -> str | None:
        """Why rows through a layer's codecs are not yet what a cache holds of them, or reads; None: they are.

        fitted: empty where nothing is fitted yet; then of what the settings allow.
        """
        return "drops tokens" if self.drops_tokens else None

    def fit_layer(self, facts: LayerFacts) -> dict[str, Tensor]:
        """Tensors of one layer from its calibration statistics."""
        return {}

    @property
    def samples(self) -> bool:
        """Whether `fit_layer` needs `facts.sample`: rows of the calibration text as they are."""
        return False

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
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), hints(type(self))[f.name])
        require(1 <= self.window <= EXACT, f"window={self.window}", f"Use 1 to {EXACT} tokens.")
        require(0 <= self.sinks <= EXACT, f"sinks={self.sinks}", f"Use 0 to {EXACT} tokens.")

    def __post_init__(self) -> None:
        for f in fields(self):
            if type(given := getattr(self, f.name)) is list:  # as JSON has it
                object.__setattr__(self, f.name, tuple(given))
        self.check()

    def settings(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """Bits of a token's key and value in the body's youngest tier, scales included. 0 if dropped."""
        pair = self.codecs(shape, fitted)
        return 0.0 if pair is None else sum(c.page_bytes() for c in pair) * 8 / self.page

    def layer_bytes(self, shape: LayerShape, fitted: Fitted, tokens: int, batch: int = 1) -> int:
        """Bytes a layer holds after one prefill of `tokens` unpadded tokens. The cache must hold exactly this."""
        window = (self.window + self.page) * shape.token_bytes
        pages = max(0, tokens - self.sinks - self.window) // self.page if tokens > self.window + self.page else 0
        if tokens <= self.window + self.page:
            return batch * window
        sinks = self.sinks * (shape.token_bytes + 4)  # and a 4-byte column each
        return batch * (window + sinks + self.body_bytes(shape, fitted, pages))

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        """Bytes of the body of one sequence, after so many pages left the window."""
        return int(pages * self.bits_per_token(shape, fitted) * self.page / 8)
