"""Expected Attention: what the next queries will look at, by the mean and the spread of those so far. arXiv 2510.00636

Queries before RoPE are taken as normal: mean mu and covariance S of each query head. R is the mean rotation over the
next `ahead` positions. The expected logit of a key is k R mu + 1/2 k R S R^T k (scaled as attention does); softmax over
the tokens at hand, the mean over the query heads of a KV head, plus `epsilon`, times |v|.

Departures: at most 2,048 queries of a step are asked, spread evenly; a probability counts as a multiple of an even
share, so that tokens judged in steps of different lengths compare; a token is judged once, when it leaves the window;
heads keep alike unless `floor` lets them compete, as the paper's best results do.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence, Reduce
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.shapes import Float, Int

MOST = 2048  # queries asked


@final
@dataclass(frozen=True)
class Expected(Scorer):
    """Expected attention of the next `ahead` queries, times the value's norm."""

    ahead: int
    epsilon: float
    reduce: ClassVar[Reduce | None] = None

    def queries(self, count: int) -> Int[Tensor, " x"]:
        return torch.linspace(0, count - 1, min(count, MOST)).round().long()

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        mean, spread = self._statistics(seen)  # [b, q, d], [b, q, d, d]
        h = seen.keys.shape[1]
        found = torch.zeros(seen.keys.shape[:3], device=seen.keys.device)
        for head in range(h):  # so that no float32 copy of all keys is made
            keys = seen.keys[:, head].float()
            own = slice(head * (mean.shape[1] // h), (head + 1) * (mean.shape[1] // h))
            logits = keys[:, None] @ mean[:, own, :, None]  # [b, m, t, 1]
            logits = logits[..., 0] + 0.5 * ((keys[:, None] @ spread[:, own]) * keys[:, None]).sum(-1)
            weights = logits.masked_fill(~seen.real[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
            found[:, head] = (weights.mean(1) + self.epsilon) * seen.values[:, head].float().norm(dim=-1)
        return found * seen.real.sum(1)[:, None, None]

    def _statistics(self, seen: Evidence) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the queries asked, as they are over the next positions."""
        assert seen.asked is not None
        assert seen.asked_rows is not None
        first = seen.keys.shape[2] - seen.new
        at = seen.positions[:, first + seen.asked_rows.to(seen.positions.device)]
        there = (at >= 0)[:, None, :, None]
        rows = seen.asked.float() if seen.undo is None else seen.undo(seen.asked, at).float()
        count = there.sum(2, keepdim=True).clamp_min(1)
        mean = rows.masked_fill(~there, 0.0).sum(2, keepdim=True) / count
        apart = (rows - mean).masked_fill(~there, 0.0)
        spread = apart.transpose(2, 3) @ apart / count
        if seen.turn is None:
            return mean[:, :, 0], spread
        turns = self._mean_turn(seen)
        return (mean @ turns)[:, :, 0], turns.transpose(-1, -2) @ spread @ turns

    def _mean_turn(self, seen: Evidence) -> Float[Tensor, "b 1 d d"]:
        """What RoPE does to a row in the mean over the next positions."""
        assert seen.turn is not None
        b, _, _, d = seen.keys.shape
        ahead = seen.positions.amax(1, keepdim=True) + 1 + torch.arange(self.ahead, device=seen.positions.device)
        unit = torch.eye(d, device=seen.keys.device)[None, :, None].expand(b, -1, self.ahead, -1)
        return seen.turn(unit, ahead).float().mean(2)[:, None]


@final
@dataclass(frozen=True)
class ExpectedAttention(Evicting):
    """`ratio` of the tokens behind the window, those that the queries to come are expected to look at."""

    ahead: int = 512
    epsilon: float = 0.0

    def scorer(self, fitted: Fitted) -> Scorer:
        return Expected(self.ahead, self.epsilon)

    def check(self) -> None:
        super().check()
        require(1 <= self.ahead <= 2**16, f"ahead={self.ahead}", "Use 1 to 65536 positions.")
        require(self.epsilon >= 0, f"epsilon={self.epsilon}", "Use 0 or more.")


METHOD = ExpectedAttention
