"""One rung of the ladder of ages that a body may be."""

from typing import NamedTuple

from kvshrink.methods._codec import Codec


class Tier(NamedTuple):
    """Pages of one age: key and value codec, None if they are dropped, and how many tokens may have this age.

    tokens: in whole pages, rounded down; None: no limit.
    visual: beside the ladder, for pages of tokens that came from images or videos; the last of a layer's tiers.
    every: beside it too, for all tokens, where the first tier holds some of them better; those are read there. The
    last.
    """

    codecs: tuple[Codec, Codec] | None
    tokens: int | None = None
    visual: bool = False
    every: bool = False

    @property
    def beside(self) -> bool:
        """Whether no page grows into it."""
        return self.visual or self.every
