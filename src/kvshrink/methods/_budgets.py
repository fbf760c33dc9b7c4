"""How many of the tokens that left the window each lane may hold: in shares, in tokens, over heads together, by a
threshold, by attention mass."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.shapes import Float, Int


class Budget(ABC):
    """How many of the tokens that left the window each lane may hold."""

    @abstractmethod
    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        """Tokens. importance: of the candidates, -inf for what is none; pages: how many of each row have left."""

    @abstractmethod
    def pages(self, left: int, lanes: int, page: int) -> int:
        """Pages that all lanes of a row hold, of so many that left."""


@dataclass(frozen=True)
class Uniform(Budget):
    """The same share of tokens in every lane, rounded up to whole pages. most: pages of a lane; None: any number."""

    ratio: float
    most: int | None = None

    def of(self, left: int) -> int:
        """Pages of a lane."""
        own = -(-round(left * self.ratio * 2**20) // 2**20)  # 0.1 of 10 is 1, whatever floats say
        return own if self.most is None else min(own, self.most)

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        own = torch.tensor([self.of(n) * page for n in pages.tolist()], device=importance.device)
        return own[:, None].expand(importance.shape[:2])

    def pages(self, left: int, lanes: int, page: int) -> int:
        return self.of(left) * lanes


@final
@dataclass(frozen=True)
class Shared(Uniform):
    """All heads of a layer compete for its tokens; each has `floor` of an even share at least (AdaKV)."""

    floor: float = 0.2

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        lanes, even = importance.shape[1], super().counts(importance, pages, page)[:, :1]
        ranks = importance.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(importance)
        won = ((ranks < lanes * even[..., None]) & (importance > -torch.inf)).sum(-1)
        own = won * lanes * even / won.sum(-1, keepdim=True).clamp_min(1)
        return whole_pages(self.floor * even + (1 - self.floor) * own, page)


def whole_pages(tokens: Float[Tensor, "b L"], page: int) -> Int[Tensor, "b L"]:
    """Shares of lanes in whole pages of the same sum, rounded down: what is over goes to those that lost most."""
    share = tokens / page
    whole = share.floor()
    spare = (tokens.sum(-1, keepdim=True) / page).round() - whole.sum(-1, keepdim=True)
    lost = (share - whole).argsort(dim=1, descending=True, stable=True).argsort(1)
    return ((whole + (lost < spare)) * page).long()


@final
@dataclass(frozen=True)
class ByHead(Budget):
    """Of each lane its own: a share of all tokens that left, and so many besides; never more than there are.

    shares, tokens: of each lane.
    """

    shares: tuple[float, ...]
    tokens: tuple[int, ...]

    def of(self, left: int, page: int) -> list[int]:
        """Pages of each lane, of so many that left."""
        found = []
        for share, more in zip(self.shares, self.tokens, strict=True):
            own = -(-round((left * share + more / page) * 2**20) // 2**20)
            found.append(min(left, own))
        return found

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        return torch.tensor([self.of(n, page) for n in pages.tolist()], device=importance.device) * page

    def pages(self, left: int, lanes: int, page: int) -> int:
        return sum(self.of(left, page))


@final
@dataclass(frozen=True)
class Classes(Budget):
    """Heads of two classes before it is known which is which: the share `whole` keeps everything, others so many
    tokens."""

    whole: float
    tokens: int

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        own = torch.tensor([self.pages(n, importance.shape[1], page) for n in pages.tolist()])
        even = -(-own // importance.shape[1]) * page
        return even[:, None].expand(importance.shape[:2]).to(importance.device)

    def pages(self, left: int, lanes: int, page: int) -> int:
        return round(lanes * (self.whole * left + (1 - self.whole) * min(left, -(-self.tokens // page))))


@final
@dataclass(frozen=True)
class Threshold(Budget):
    """What has an importance of at least `least` stays, in the nearest number of whole pages, a page at least.

    ratio: the share that this comes to, by which bytes are promised. up: in whole pages that hold all of it.
    """

    ratio: float
    least: float = 0.0
    up: bool = False

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        own = (importance >= self.least).sum(-1)
        if self.up:
            return -(-own // page) * page
        return ((own + page // 2) // page).clamp_min(1) * page

    def pages(self, left: int, lanes: int, page: int) -> int:
        return Uniform(self.ratio).pages(left, lanes, page)


@final
@dataclass(frozen=True)
class Mass(Budget):
    """The fewest tokens whose importance is `share` of all lanes' together, the same number in each lane, and `ratio`
    of them at most, by which bytes are promised (ZipVL)."""

    ratio: float
    share: float

    def counts(self, importance: Float[Tensor, "b L t"], pages: Int[Tensor, " b"], page: int) -> Int[Tensor, "b L"]:
        always = (importance == torch.inf).sum(-1).amax(1)  # which stay, whatever the others have
        weights = importance.masked_fill(~importance.isfinite(), 0.0).clamp_min(0)
        ordered = weights.sort(dim=-1, descending=True).values.sum(1)  # [b, t]
        reached = ordered.cumsum(-1) >= self.share * ordered.sum(-1, keepdim=True)
        fewest = importance.shape[-1] - reached.sum(-1) + 1 + always
        own = -(-fewest // page) * page
        most = Uniform(self.ratio).counts(importance, pages, page)
        return own[:, None].expand_as(most).minimum(most)

    def pages(self, left: int, lanes: int, page: int) -> int:
        return Uniform(self.ratio).pages(left, lanes, page)
