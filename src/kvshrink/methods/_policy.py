"""Which tokens stay, and how many: Scorer, Budget, and the Policy that holds both. What becomes of a token's bytes is
for the ladder of tiers to say.

A Scorer makes importance of what is known of tokens (methods/_evidence.py); pads, sinks and the window are the
framework's. A Budget (methods/_budgets.py) says how many tokens each lane may hold of those that left the window; the
framework keeps the most important ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from kvshrink.methods._budgets import Budget
from kvshrink.methods._evidence import Evidence, Reduce
from kvshrink.shapes import Float, Int

SHARE = 0.05  # of a step's queries: the last ones, and as many random ones
SEED = 0

Keeps = Literal["step", "sum", "latest", "own"]
Schedule = int | Literal["page", "prompt"]
Pages = tuple[int, int]


class Scorer(ABC):
    """Importance of tokens; of two alike the earlier one wins, inf always stays.

    keeps:  what importance is from step to step. "step": what one step said, once, when a token leaves the window;
            "sum": it adds up over steps, of stored tokens too, what was there before times `decay` for each new token;
            "latest": as "step", but stored tokens get what the step says too, in place of what they had;
            "own": it is known when a token comes, from the token itself, and stays. `importance` is asked of the
            step's new tokens alone. Safe to share a prefix by: what comes later changes nothing.
    asks:   whether it wants queries.
    reduce: what is made of the probabilities of the queries asked; None: the queries alone are wanted.
    everything: attention is over all that a step sees; else over the exact tokens at hand alone.
    hidden: whether the layer's input is needed, of new tokens.
    judged: whether the model reads a prompt again to say what of it it needs (attach/judging.py).
    """

    keeps: ClassVar[Keeps] = "step"
    asks: ClassVar[bool] = True
    reduce: ClassVar[Reduce | None] = "sum"
    everything: ClassVar[bool] = True
    hidden: ClassVar[bool] = False
    judged: ClassVar[bool] = False

    @property
    def decay(self) -> float:
        return 1.0

    @property
    def listens(self) -> bool:
        """Whether some of the queries that read a prompt again are wanted too."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether tokens of the window have an importance already."""
        return self.keeps in ("sum", "own")

    @property
    def causal(self) -> bool:
        """Whether a token's importance depends on nothing that comes after it."""
        return self.keeps == "own" and not self.judged

    def queries(self, count: int) -> Int[Tensor, " x"]:
        """Which of a step's `count` new tokens are asked, in order. Not called where `asks` is False."""
        return torch.arange(count)

    def least(
        self, judged: Mapping[int, Float[Tensor, "b L t"]], pages: Sequence[Pages], page: int
    ) -> dict[int, Float[Tensor, "b L"]]:
        """What a token must have to stay, in each lane of each layer, of a judged prompt. judged: scores of the tokens
        that leave the window, -inf elsewhere; pages: of each row, how many have left before and after."""
        return {i: x.new_zeros(x.shape[:2]) for i, x in judged.items()}

    def weights(self, count: int) -> Float[Tensor, " x"] | None:
        """What each query's attention counts, of those asked of so many new tokens; None: 1."""
        return None

    def of_stored(self, got: Float[Tensor, "b h slots"]) -> Float[Tensor, "b h slots"]:
        """What stored tokens' importance grows by, or becomes, of what they got in a step."""
        return got

    @abstractmethod
    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        """Of neighbouring tokens in the order of their columns; with `keeps` "own" of the new ones."""


class Policy(NamedTuple):
    """What becomes of a layer's tokens when they leave the window.

    scorer: by what tokens are ranked, where something depends on their importance.
    budget: how many of the tokens that left may stay; None: all that the tiers hold.
    visual: the same of tokens that came from images or videos; None: they are counted with all.
    schedule: when tokens are dropped. "page": whenever a page leaves; "prompt": in steps of several tokens, and what is
              decoded stays until the next one; a number: while decoding, once a lane holds so many above its share.
    protect: so many first tokens of each row stay, whatever their importance.
    merges: whether what a dropped token has joins the value of the nearest one that stays.
    matches: whether keys and values that stay are changed until they attend as all did (cache/matching.py).
    demotes: whether a tier beside holds every token, so that one which is not chosen is not gone.
    """

    scorer: Scorer | None = None
    budget: Budget | None = None
    visual: Budget | None = None
    schedule: Schedule = "page"
    protect: int = 0
    merges: bool = False
    matches: bool = False
    demotes: bool = False

    @property
    def remembers(self) -> bool:
        """Whether every step adds to what is known of tokens."""
        return self.scorer is not None and self.scorer.remembers

    def drops_now(self, new: int) -> bool:
        """Whether a step of so many new tokens may drop some."""
        return new > 1 or self.schedule != "prompt"


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

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        return seen.mean_mass


def probes(count: int) -> Int[Tensor, " x"]:
    """Which of `count` new tokens ask, in order; always the last one, which alone is asked of a single token."""
    each = -(-count // int(1 / SHARE))
    rest = torch.randperm(count - each, generator=torch.Generator().manual_seed(SEED))[:each]
    return torch.cat([rest, torch.arange(count - each, count)]).sort().values
