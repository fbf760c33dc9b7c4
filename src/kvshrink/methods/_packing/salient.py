"""The most important tokens of a page in one form, the others in another.

A bit a token and group says which, page / 8 bytes. Both classes have a fixed number of tokens, so bytes are known
beforehand; in each, tokens keep their order and form pages of their own, so that what is per channel is over a class.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.methods._packing.base import Importance, Packing, Stored
from kvshrink.shapes import Bool, Float
from kvshrink.store.names import under

STEP = 8  # tokens of a class come in eights, so that codes of any width and number of channels fill whole bytes


def counted(page: int, share: float) -> int:
    """The share of a page's tokens as a number of tokens: the nearest multiple of 8 that leaves both classes some."""
    return min(max(round(share * page / STEP), 1), page // STEP - 1) * STEP


@final
@dataclass(frozen=True)
class Salient(Packing):
    """high, low: how one group stores its most important tokens, and the others; their `page` is the class's size.

    Left pads are less important than any token.
    """

    groups: int
    width: int
    high: Packing
    low: Packing

    @property
    def page(self) -> int:
        return self.high.page + self.low.page

    @property
    def metadata(self) -> frozenset[str]:
        return frozenset({"mask", *(f"{name}.{s}" for name, form in self._classes() for s in form.metadata)})

    @property
    def needs_importance(self) -> bool:
        return True

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        if importance is None:  # all alike: the first ones are the chosen
            importance = latent.new_zeros(latent.shape[:3], dtype=torch.float32)
        chosen = self._chosen(importance.unflatten(1, (self.groups, -1)).mean(2), valid)  # [b, G, p, page]
        stored = {"mask": _by_page(pack(chosen.byte(), 1))}
        order = (~chosen).byte().argsort(dim=-1, stable=True)  # slots of the chosen, then of the others
        rows = latent.unflatten(2, (-1, self.page)).take_along_dim(order[..., None], 3)
        real = None
        if valid is not None:
            real = valid.unflatten(1, (-1, self.page))[:, None].expand(chosen.shape).take_along_dim(order, 3)
        at = 0
        for name, form in self._classes():
            part = slice(at, at := at + form.page)
            own = None if real is None else real[..., part].flatten(0, 1).flatten(1)
            # groups differ in which of their tokens are pads, so to a class each is a sequence of its own
            found = form.store(rows[..., part, :].flatten(0, 1).flatten(1, 2)[:, None], own)
            stored |= {f"{name}.{k}": _by_page(t.squeeze(2).unflatten(0, chosen.shape[:2])) for k, t in found.items()}
        return stored

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        chosen = unpack(stored["mask"].transpose(1, 2), 1).bool()  # [b, G, p, page]
        rows = []
        for name, form in self._classes():
            found = form.load(_of_class(stored, name))
            rows.append(found.reshape(*chosen.shape[:3], form.page, self.width))
        among = torch.where(chosen, chosen.cumsum(-1), self.high.page + (~chosen).cumsum(-1)) - 1
        return torch.cat(rows, 3).take_along_dim(among[..., None], 3).flatten(2, 3)

    def sound(self, stored: Stored) -> bool:
        right = unpack(stored["mask"], 1).sum(-1, dtype=torch.int32) == self.high.page
        return bool(right.all()) and all(form.sound(_of_class(stored, name)) for name, form in self._classes())

    def page_bytes(self) -> int:
        return self.groups * (packed_bytes(self.page, 1) + self.high.page_bytes() + self.low.page_bytes())

    def _classes(self) -> tuple[tuple[str, Packing], tuple[str, Packing]]:
        return ("high", self.high), ("low", self.low)

    def _chosen(self, importance: Float[Tensor, "b G t"], valid: Tensor | None) -> Bool[Tensor, "b G p page"]:
        """The most important tokens of each page; the earlier of two that are equally important."""
        if valid is not None:
            importance = importance.masked_fill(~valid[:, None], -torch.inf)
        order = importance.unflatten(2, (-1, self.page)).argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : self.high.page], True)


def _of_class(stored: Stored, name: str) -> Stored:
    """A class's tensors as its form stores them: each group a sequence of its own."""
    own = under(stored, f"{name}.")
    return {k: t.transpose(1, 2).flatten(0, 1).unsqueeze(2) for k, t in own.items()}


def _by_page(x: Tensor) -> Tensor:
    """[b, G, p, ...] as [b, p, G, ...]."""
    return x.transpose(1, 2).contiguous()
