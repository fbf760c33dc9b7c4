"""What a method that chooses tokens may ask of the whole model during a fit: which heads look far, and which tokens the
model needs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kvshrink.shapes import Float


class Rule(NamedTuple):
    """A head sees the first tokens and its last `least` + `share` x (tokens so far)."""

    least: int
    share: float

    def span(self, tokens: int) -> int:
        return min(tokens, self.least + round(self.share * tokens))


@dataclass(frozen=True, eq=False)
class Needed:
    """Tokens of calibration prompts, m of them, in one layer: what they are, and how much the model needs each of them.

    Rows are before RoPE. scores: as attach/judging.py says, by KV head, above 0.
    """

    hidden: Float[Tensor, "m n"]
    queries: Float[Tensor, "m q d"]
    keys: Float[Tensor, "m h d"]
    values: Float[Tensor, "m h e"]
    scores: Float[Tensor, "m h"]


class TokenProbe(ABC):
    """Asks the whole model about its heads and tokens. All answers are by layer."""

    @abstractmethod
    def gates(self, sinks: int, recent: int, steps: int) -> Mapping[int, Float[Tensor, " h"]]:
        """How much each KV head needs tokens that are neither among the first nor among the recent ones, 0 to 1."""

    @abstractmethod
    def spans(self, rules: Sequence[Rule], sinks: int) -> tuple[list[int], Mapping[int, Float[Tensor, "n r h"]]]:
        """(tokens of n texts, what each rule costs each KV head in them): the loss that the model is expected to have
        more if the head sees no more than the rule says."""

    @abstractmethod
    def needed(self) -> Mapping[int, Needed]:
        """Some tokens of the calibration text."""
