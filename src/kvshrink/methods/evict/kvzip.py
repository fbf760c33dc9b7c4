"""KVzip: a model reads the prompt again, and what it looks at to repeat it stays. arXiv 2505.23416

Importance is the most attention that any query of the repetition gives a token (attach/judging.py): it depends on no
question, so that one prompt serves many. All tokens of all layers and heads compete, and the best `ratio` stay.
per="head" ranks heads alone: the most important ones keep everything, the others nothing but sinks and window.

A prompt takes about three times as long. What is decoded stays, and the next prompt is judged by itself.

Departures: no request to repeat stands before the repetition, since the cache knows no tokenizer; a head keeps whole
pages of 32 tokens, so that the sum over all heads is the budget's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.methods._budgets import Budget, Threshold, Uniform, whole_pages
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Keeps, Pages, Schedule, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import one_of, require
from kvshrink.shapes import Bool, Float, Int

NOTHING = 1e30  # more than any token of a head that keeps none has
Per = Literal["model", "layer", "head", "even"]


@final
@dataclass(frozen=True)
class Repeated(Scorer):
    """How much the model needed a token; later ones always stay."""

    ratio: float
    per: Per
    keeps: ClassVar[Keeps] = "own"
    asks: ClassVar[bool] = False
    judged: ClassVar[bool] = True

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        if seen.judged is not None:
            return seen.judged
        b, h, _, _ = seen.keys.shape
        return torch.full((b, h, seen.new), torch.inf, device=seen.keys.device)

    def shared(
        self,
        judged: Mapping[int, Float[Tensor, "b h s"]],
        candidates: Bool[Tensor, "b s"],
        pages: Pages,
        page: int,
        waiting: Mapping[int, Int[Tensor, "b h"] | None],
    ) -> dict[int, Float[Tensor, "b h s"]]:
        """Importance less what the last token of each head that stays has: what is 0 or more stays."""
        if self.per == "even":
            return dict(judged)
        layers = sorted(judged)
        every = torch.stack([judged[i].to(candidates.device) for i in layers], 1)  # [b, layers, h, s]
        every = every.masked_fill(~candidates[:, None, None], -torch.inf)
        none = torch.zeros(every.shape[0], every.shape[2], dtype=torch.long, device=every.device)
        known = [none if (n := waiting[i]) is None else n.to(every.device) for i in layers]
        counts = (self._counts(every, pages, page) - torch.cat(known, 1)).clamp_min(0)
        ordered = every.flatten(1, 2).sort(dim=-1, descending=True).values  # [b, heads, s]
        last = ordered.gather(2, (counts - 1).clamp(0, ordered.shape[2] - 1)[..., None])
        last = torch.where(counts[..., None] > 0, last, NOTHING)
        least = last.masked_fill(last == -torch.inf, 0.0).view(*every.shape[:3], 1)
        return {i: judged[i] - least[:, n].to(judged[i].device) for n, i in enumerate(layers)}

    def _counts(self, every: Float[Tensor, "b n h s"], pages: Pages, page: int) -> Tensor:
        """Tokens of each head of each layer, in whole pages [b, n * h]."""
        n, h, s = every.shape[1:]
        share, new = Uniform(self.ratio), pages[1] - pages[0]
        even = (share.of(pages[1]) - share.of(pages[0])) * page
        if self.per == "head":
            best = every.amax(-1).flatten(1)  # [b, n * h]
            full = min(n * h, max(1, round(n * h * even / max(1, new * page))))
            rank = best.argsort(dim=1, descending=True, stable=True).argsort(1)
            return torch.where(rank < full, new * page, 0)
        groups = every.flatten(1).unflatten(1, (1 if self.per == "model" else n, -1))  # [b, groups, heads * s]
        heads = groups.shape[2] // s
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1).unflatten(-1, (heads, s))
        won = ((rank < heads * even) & (groups.unflatten(-1, (heads, s)) > -torch.inf)).sum(-1)
        own = won * heads * even / won.sum(-1, keepdim=True).clamp_min(1)
        counts = torch.stack([whole_pages(part, page) for part in own.unbind(1)], 1)
        return counts.clamp_max(new * page).flatten(1)


@final
@dataclass(frozen=True)
class KVzip(Evicting):
    """`ratio` of a prompt's tokens behind the window, over all layers and heads. per: whose tokens compete: of the
    whole "model", of each "layer"; "head": heads do, as wholes; "even": all heads keep as many, of all tokens so
    far."""

    per: Per = "model"
    schedule: Schedule = field(default="prompt", kw_only=True)

    def scorer(self, fitted: Fitted) -> Scorer:
        return Repeated(self.ratio, self.per)

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        return Uniform(ratio) if self.per == "even" else Threshold(ratio, up=True)

    def check(self) -> None:
        super().check()
        one_of("per", self.per, ("model", "layer", "head", "even"))
        require(self.schedule == "prompt", f"schedule={self.schedule!r}", "Only prompts are read again. Use 'prompt'.")
        other = self.most is None and self.floor is None and self.visual_ratio is None
        require(other, f"per={self.per!r} beside most, floor or visual_ratio", "Leave them out.")


METHOD = KVzip
