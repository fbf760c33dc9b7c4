"""How rows of keys or values become stored pages, and rows again: the role of every form in which tokens are stored."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels.decode import Basis
from kvshrink.kernels.latents import Packed
from kvshrink.methods._packing.base import Importance, Stored
from kvshrink.shapes import Bool, Float, Int


class Projection(NamedTuple):
    """The change of basis of a codec by itself: its rank, and rows [b, h, t, d] as they come back if nothing is
    rounded."""

    rank: int
    apply: Callable[[Tensor], Tensor]


class Codec(ABC):
    """Rows of one site <-> stored pages. `decode` is `expand(unpack(stored))`: the second half is linear, so that
    values can stay latent until after the softmax-weighted sum.

    site:  "k_pre" keys before RoPE, "k_post" keys as attention uses them, "v" values.
    metadata: names of the stored tensors that are scales, minima and the like, not payload.
    width: channels of one group's latent, what `unpack` gives.
    joint: keys and values are stored as one: the key codec gets the rows of both, 2h heads, and the value codec reads
           what it stored.
    Of a layer that is stored as a delta (`Method.stores_delta`) the pages hold that one's tensors too, as "base.*".
    """

    if TYPE_CHECKING:  # read only, so that it may be a field of a dataclass, or a property

        @property
        def site(self) -> Literal["k_pre", "k_post", "v"]: ...

    else:
        site: Literal["k_pre", "k_post", "v"]

    @property
    @abstractmethod
    def metadata(self) -> frozenset[str]: ...

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    def joint(self) -> bool:
        return False

    @abstractmethod
    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        """Whole pages of rows, encoded, with everything that is known of them.

        valid:      invalid rows (left pads) may hold anything and must not matter; None: all are valid.
        importance: of the tokens, where the codec needs it.
        base:       pages of the same tokens in the layer that this one follows, where it stores a delta to them.
        """

    @property
    def needs_importance(self) -> bool:
        """Whether `encode` looks at the importance of tokens; only then is it computed."""
        return False

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

    @property
    def constant(self) -> Float[Tensor, "h d"] | None:
        """A part of all keys before RoPE that is not in "k_post" rows as they are stored, and that RoPE turns by the
        position: what it adds to a score follows from the position alone. None: rows are whole."""
        return None

    def pick(self, stored: Stored, tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b G k r"]:
        """What `unpack` gives, for some tokens of each row."""
        return self.unpack(stored).take_along_dim(tokens[:, None, :, None], 2)

    def reads(self, tokens: int) -> int | None:
        """How many of the body's tokens a single new token reads, those of the highest `scores`; None: all."""
        return None

    def scores(self, query: Float[Tensor, "b h x d"], stored: Stored) -> Float[Tensor, "b t"]:
        """What chooses the tokens that are read. Called only of a codec whose `reads` gives a number."""
        raise NotImplementedError(f"{type(self).__name__} has all tokens read")

    def truncate(self, stored: Stored) -> Stored:
        """Pages of the next younger tier as this codec stores them: a part of the same tensors, nothing rounded again.
        Called only of a codec of an older tier."""
        raise NotImplementedError(f"{type(self).__name__} takes over no pages")

    def sound(self, stored: Stored) -> bool:
        """Whether tensors of the right shapes, which come from a file, hold no place outside of what they index."""
        return True

    @property
    def projection(self) -> Projection | None:
        """What is lost of keys before RoPE, or of values, but for rounding: what a drift watch compares with the
        calibration text. None: it is no projection on a fitted basis alone."""
        return None

    def to(self, device: torch.device) -> "Codec":
        """The codec with its tensors on a device; itself where it holds none."""
        return self

    def decode(self, stored: Stored, heads: int) -> Float[Tensor, "b h t d"]:
        return self.expand(self.unpack(stored), heads)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Codec":
        return self  # settings and fitted tensors are shared by all sequences, also by a copied cache
