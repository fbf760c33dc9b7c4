"""KeyDiff: keys that are unlike the others stay; many that are alike say one thing. arXiv 2504.15364

Importance is -cos(k, a), where a is the mean of the unit keys at hand: no query is asked. Departures: of a prompt in
chunks, and while decoding, the mean is over the exact tokens at hand, and a token is judged once, when it leaves the
window; whole pages of 32 go.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import normalize

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.shapes import Float


@final
class Unlike(Scorer):
    """How far a key points from the mean of all."""

    asks: ClassVar[bool] = False

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        real = seen.real[:, None, :, None]
        unit = normalize(seen.keys.float(), dim=-1).masked_fill(~real, 0.0)
        anchor = normalize(unit.sum(2, keepdim=True), dim=-1)  # the mean's direction
        return -(unit * anchor).sum(-1)


@final
@dataclass(frozen=True)
class KeyDiff(Evicting):
    """`ratio` of the tokens behind the window, those whose keys are least like the mean key."""

    def scorer(self, fitted: Fitted) -> Scorer:
        return Unlike()


METHOD = KeyDiff
