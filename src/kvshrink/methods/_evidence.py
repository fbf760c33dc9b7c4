"""What is known of tokens when they may leave the window: what a Scorer makes importance of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from kvshrink.shapes import Bool, Float, Int

Reduce = Literal["sum", "max", "below"]  # "below": how many queries give a token less than an even share


class Heard(NamedTuple):
    """What a model said of a layer's new tokens when it read them again. scores: their importance, 0 to 1, at pads 0.

    queries: some of those of the repetition, as attention uses them at these positions, times its scale; reach: how
    many tokens their step had seen; sinks: of each of these, the logit that takes a share and is no token.
    """

    scores: Float[Tensor, "b h s"]
    queries: Float[Tensor, "b h m d"] | None = None
    positions: Int[Tensor, "b m"] | None = None
    reach: Int[Tensor, "b m"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, "b h m"] | None = None


class Judged(NamedTuple):
    """The same of a step. least: what a token must have to stay, of those that leave in it."""

    heard: Heard
    least: Float[Tensor, "b h"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Of the exact tokens at hand, t of them, of which the last s are the step's new ones.

    keys:      as attention uses them.
    real:      which of them are tokens, and no pads.
    mass:      probabilities of the queries asked, reduced over these queries and the query heads of a KV head; None:
               none was asked. seen: how many of the queries see a token.
    asked:     those queries as attention uses them, times its scale.
    undo:      rows [b, n, s, d] of the new tokens as they are before RoPE; of the queries asked [b, q, x, d] too.
    hidden:    the layer's input of the new tokens, where the scorer wants it.
    order:     positions as they count up, also where RoPE marks them.
    judged:    scores of the new tokens, where the model read the prompt again.
    """

    keys: Float[Tensor, "b h t d"]
    values: Float[Tensor, "b h t e"]
    positions: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    new: int
    mass: Float[Tensor, "b h t"] | None = None
    seen: Float[Tensor, "b t"] | None = None
    asked: Float[Tensor, "b q x d"] | None = None
    asked_rows: Int[Tensor, " x"] | None = None
    undo: Callable[[Tensor, Tensor], Tensor] | None = None
    turn: Callable[[Tensor, Tensor], Tensor] | None = None
    hidden: Float[Tensor, "b s n"] | None = None
    order: Int[Tensor, "b t"] | None = None
    judged: Float[Tensor, "b h s"] | None = None

    @property
    def counted(self) -> Int[Tensor, "b t"]:
        """Positions, -1 at pads, each one more than the one before."""
        return self.positions if self.order is None else self.order

    @property
    def got(self) -> Float[Tensor, "b h t"]:
        """The mass, of a scorer that asks."""
        assert self.mass is not None
        return self.mass

    @property
    def mean_mass(self) -> Float[Tensor, "b h t"]:
        """Mass over the number of queries that see a token."""
        assert self.seen is not None
        return self.got / self.seen.clamp_min(1)[:, None]
