"""Which tokens to keep, and how many: Scorer and Budget. What becomes of a token is for the ladder of tiers to say.

A Scorer turns the attention that tokens got into importance; pads, sinks and the window are the framework's. A Budget
says how many tokens each lane may hold of those that left the window; the framework keeps the most important ones.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from kvshrink.shapes import Float, Int

SHARE = 0.05  # of a step's queries: the last ones, and as many random ones
SEED = 0


class Received(NamedTuple):
    """Attention that tokens got from some queries of a step.

    mass: summed over these queries and the query heads of a KV head; seen: how many of the queries see a token.
    """

    mass: Float[Tensor, "b h t"]
    seen: Float[Tensor, "b t"]


class Scorer(ABC):
    """Importance of tokens; of two alike the earlier one wins.

    running:    importance adds up over steps, of stored tokens too; else it is what one step said, once.
    everything: attention is over all that a step sees; else over the exact tokens at hand alone.
    """

    running: ClassVar[bool] = False
    everything: ClassVar[bool] = True

    @abstractmethod
    def queries(self, count: int) -> Int[Tensor, " x"]:
        """Which of a step's `count` new tokens are asked, in order."""

    @abstractmethod
    def importance(self, received: Received) -> Float[Tensor, "b h t"]:
        """Of neighbouring tokens in the order of their columns."""


class Budget(ABC):
    """How many of the tokens that left the window each lane may hold."""

    @abstractmethod
    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        """Tokens. importance: of the candidates, -inf for what is none; pages: how many of each row have left."""

    @abstractmethod
    def pages(self, left: int, lanes: int) -> int:
        """Pages that all lanes of a row hold, of so many that left."""


@dataclass(frozen=True)
class Uniform(Budget):
    """The same share of tokens in every lane, rounded up to whole pages."""

    ratio: float

    def of(self, left: int) -> int:
        """Pages of a lane."""
        return -(-round(left * self.ratio * 2**20) // 2**20)  # 0.1 of 10 is 1, whatever floats say

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        own = torch.tensor([self.of(n) * page for n in pages.tolist()], device=importance.device)
        return own[:, None].expand(importance.shape[:2])

    def pages(self, left: int, lanes: int) -> int:
        return self.of(left) * lanes


@final
class NormalisedAttention(Scorer):
    """ZipCache's normalised saliency, arXiv 2405.14256: the last 5 % of a step's queries and a random 5 % are asked.

    What a token gets is divided by the number of probes that see it: an early token is seen by more queries than a late
    one and must not win by that. The official code divides by the number of all queries behind the token, though it
    sums over probes alone. Attention is over the exact tokens at hand, which are a prompt's own in its prefill.
    """

    everything: ClassVar[bool] = False

    def queries(self, count: int) -> Int[Tensor, " x"]:
        return probes(count)

    def importance(self, received: Received) -> Float[Tensor, "b h t"]:
        return received.mass / received.seen.clamp_min(1)[:, None]


def probes(count: int) -> Int[Tensor, " x"]:
    """Which of `count` new tokens ask, in order; always the last one, which alone is asked of a single token."""
    each = -(-count // int(1 / SHARE))
    rest = torch.randperm(count - each, generator=torch.Generator().manual_seed(SEED))[:each]
    return torch.cat([rest, torch.arange(count - each, count)]).sort().values
