"""What methods have in common whose model reads a prompt again to say what of it it needs (attach/judging.py)."""

from collections.abc import Mapping, Sequence
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
from kvshrink.shapes import Float, Int

NOTHING = 1e30  # more than any token of a head that keeps none has
Per = Literal["model", "layer", "head", "even"]


@final
@dataclass(frozen=True)
class Repeated(Scorer):
    """How much the model needed a token; later ones always stay."""

    ratio: float
    per: Per
    heard: bool = False
    keeps: ClassVar[Keeps] = "own"
    asks: ClassVar[bool] = False
    judged: ClassVar[bool] = True

    @property
    def listens(self) -> bool:
        return self.heard

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        if seen.judged is not None:
            return seen.judged
        b, h, _, _ = seen.keys.shape
        return torch.full((b, h, seen.new), torch.inf, device=seen.keys.device)

    def least(
        self, judged: Mapping[int, Float[Tensor, "b L t"]], pages: Sequence[Pages], page: int
    ) -> dict[int, Float[Tensor, "b L"]]:
        """What the last token of each lane that stays has."""
        if self.per == "even":
            return super().least(judged, pages, page)
        layers = sorted(judged)
        lanes = [judged[i].shape[1] for i in layers]
        every = torch.cat([judged[i].cpu() for i in layers], 1)  # [b, all lanes, t]
        ordered = every.sort(dim=-1, descending=True).values
        found = torch.full(every.shape[:2], NOTHING)
        for row, own in enumerate(pages):
            counts = self._counts(every[row], lanes, own, page)
            last = ordered[row].gather(1, (counts - 1).clamp(0, ordered.shape[2] - 1)[:, None])[:, 0]
            last = last.masked_fill(last == -torch.inf, 0.0)  # all that there are
            found[row] = torch.where(counts > 0, last, NOTHING)
        return {i: x.to(judged[i].device) for i, x in zip(layers, found.split(lanes, 1), strict=True)}

    def _counts(self, every: Float[Tensor, "n t"], lanes: Sequence[int], pages: Pages, page: int) -> Int[Tensor, " n"]:
        """Tokens of each lane of one row, in whole pages."""
        share, new = Uniform(self.ratio), pages[1] - pages[0]
        even = (share.of(pages[1]) - share.of(pages[0])) * page
        if self.per == "head":
            best = every.amax(1)
            full = min(len(best), max(1, round(len(best) * even / max(1, new * page))))
            rank = best.argsort(descending=True, stable=True).argsort()
            return torch.where(rank < full, new * page, 0)
        groups = [len(every)] if self.per == "model" else list(lanes)
        return torch.cat([self._of_group(part, even, page) for part in every.split(groups)]).clamp_max(new * page)

    def _of_group(self, every: Float[Tensor, "n t"], even: int, page: int) -> Int[Tensor, " n"]:
        """Of lanes that compete for so many tokens each."""
        heads = len(every)
        rank = every.flatten().argsort(descending=True, stable=True).argsort().view_as(every)
        won = ((rank < heads * even) & (every > -torch.inf)).sum(1)
        return whole_pages((won * heads * even / won.sum().clamp_min(1))[None], page)[0]


@dataclass(frozen=True)
class ReadingAgain(Evicting):
    """`ratio` of a prompt's tokens behind the window, over all layers and heads. per: whose tokens compete: of the
    whole "model", of each "layer"; "head": heads do, as wholes; "even": all heads keep as many, of all tokens so
    far."""

    per: Per = "model"
    schedule: Schedule = field(default="prompt", kw_only=True)

    counted_by: ClassVar[str | None] = "a choice over all heads"

    def scorer(self, fitted: Fitted) -> Scorer:
        return Repeated(self.ratio, self.per)

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        return Uniform(ratio) if self.per == "even" else Threshold(ratio, up=True)

    def check(self) -> None:
        super().check()
        one_of("per", self.per, ("model", "layer", "head", "even"))
        require(self.schedule == "prompt", f"schedule={self.schedule!r}", "Only prompts are read again. Use 'prompt'.")
