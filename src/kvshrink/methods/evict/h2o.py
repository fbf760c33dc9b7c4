"""H2O: keep the heavy hitters, the tokens that attention has read most so far. arXiv 2306.14048

A token's importance is the attention that all queries paid it, added up over the prompt and every later step, by the
query heads of its KV head. Tokens that leave the window compete with those that are held; the lightest are dropped.

Departures: the recent half of the paper's budget is the window, whose size is a setting; tokens are dropped in whole
pages of 32 when a page leaves the window, not one in each step, so that between two of these moments up to 31 more are
held; the first 4 tokens are exact too. Positions stay each token's own. Softmax is over what is held, as in the paper.
A step costs one more reading of the kept keys, in plain torch.
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
class Accumulated(Scorer):
    """The attention of all queries, added up."""

    keeps: ClassVar[Keeps] = "sum"

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        return seen.got


@final
@dataclass(frozen=True)
class H2O(Evicting):
    """`ratio` of the tokens behind the window, those that got most attention."""

    def scorer(self, fitted: Fitted) -> Scorer:
        return Accumulated()


METHOD = H2O
