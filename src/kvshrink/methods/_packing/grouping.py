"""Which numbers of a page share metadata.

axis "channel": the tokens of a page, for each channel; "token": `group` neighbouring channels of a token; "page": all.
A group never crosses a page or a group of KV heads.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvshrink.methods._packing.base import joined, paged, there
from kvshrink.shapes import Bool, Float

Axis = Literal["channel", "token", "page"]


class Grouping(NamedTuple):
    """How pages [b, p, G, page, width] are cut into groups."""

    axis: Axis
    width: int
    page: int
    group: int = 64

    @property
    def per_token(self) -> int:
        """Groups of a token (axis "token"); the last one may be smaller."""
        return -(-self.width // self.group)

    @property
    def groups(self) -> int:
        """Groups of a page."""
        return self.page * self.per_token if self.axis == "token" else self.width if self.axis == "channel" else 1

    def split(self, latent: Float[Tensor, "b G t r"]) -> Tensor:
        """Groups last: [b, p, G, r, page], [b, p, G, page, per_token, group] or [b, p, G, page * r]."""
        return self.of(paged(latent, self.page))

    def of(self, pages: Float[Tensor, "b p G page r"]) -> Tensor:
        """The same of pages."""
        if self.axis == "channel":
            return pages.transpose(-1, -2)
        if self.axis == "page":
            return pages.flatten(-2)
        # a ragged last group is filled with copies of the last channel, which change neither minimum nor maximum
        spare = self.per_token * self.group - self.width
        if spare:
            pages = torch.cat([pages, pages[..., -1:].expand(*pages.shape[:-1], spare)], -1)
        found: Tensor = pages.unflatten(-1, (self.per_token, self.group))
        return found

    def pages(self, x: Tensor) -> Tensor:
        """Groups as pages [b, p, G, page, r] again."""
        if self.axis == "channel":
            return x.transpose(-1, -2)
        return x.unflatten(-1, (self.page, -1)) if self.axis == "page" else x.flatten(-2)[..., : self.width]

    def join(self, x: Tensor) -> Float[Tensor, "b G t r"]:
        """The inverse of `split`."""
        return joined(self.pages(x))

    def spread(self, metadata: Tensor) -> Tensor:
        """One number a group as one a channel, broadcast over pages [b, p, G, page, r]."""
        if self.axis == "channel":
            return metadata[..., None, :]
        if self.axis == "page":
            return metadata[..., None, None]
        return metadata.repeat_interleave(self.group, -1)[..., : self.width]

    def real(self, valid: Bool[Tensor, "b t"] | None, groups: Tensor) -> Tensor | None:
        """Which elements of `groups` (what `split` gave) are of real tokens."""
        found = there(valid, self.page)
        if found is None:
            return None
        token = found[..., 0]  # [b, p, 1, page]
        if self.axis == "channel":
            return token[..., None, :].expand(groups.shape)
        if self.axis == "token":
            return token[..., None, None].expand(groups.shape)
        return token[..., None].expand(*token.shape, self.width).flatten(-2).expand(groups.shape)
