"""KNorm: keys of small norm get much attention, so they stay. arXiv 2406.11430

Importance is -|k|, of keys as attention uses them: no query is asked. Departures: the first 4 tokens and the window
stay; whole pages of 32 go when a page leaves the window. The paper keeps the first two layers whole; here all are
alike.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.shapes import Float


@final
class SmallNorm(Scorer):
    """Of each new key by itself, so that what comes later changes nothing."""

    keeps: ClassVar[Keeps] = "own"
    asks: ClassVar[bool] = False

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        sizes: Tensor = seen.keys[:, :, -seen.new :].float().norm(dim=-1)
        return -sizes


@final
@dataclass(frozen=True)
class KNorm(Evicting):
    """`ratio` of the tokens behind the window, those with the smallest keys."""

    def scorer(self, fitted: Fitted) -> Scorer:
        return SmallNorm()


METHOD = KNorm
