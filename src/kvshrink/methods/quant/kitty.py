"""Kitty: KIVI with a few key channels at 4 bits. arXiv 2511.18643

In each page of 128 tokens the `boosted` key channels of largest mean magnitude get 4 bits, the others 2, one scale and
minimum a channel and page; values have 2 bits and one scale a token and head. 2.375 bits at heads of 128 channels, and
one bit a channel and page that says which are boosted.

Departures: 4-bit codes lie together, not as two planes of 2 bits; channels are chosen for each KV head; between 128 and
256 recent tokens are exact.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._packing import Affine, Packing
from kvshrink.methods._packing.by_channel import ByChannel
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

HIGH, LOW = 4, 2


@final
@dataclass(frozen=True)
class Kitty(Quantiser):
    """boosted: share of a head's key channels that gets 4 bits; the other keys, and values, get 2. 32 sinks."""

    window: int = 128
    sinks: int = 32
    boosted: float = 0.125

    page: ClassVar[int] = 128

    def check(self) -> None:
        super().check()
        require(0 < self.boosted < 1, f"boosted={self.boosted}", "Use a share between 0 and 1.")

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        groups, width, page = space.groups, space.width, space.page
        if kv == "value" or width < 2:
            return Affine(groups, width, page, LOW, "channel" if kv == "key" else "token", width)
        high = min(max(1, round(self.boosted * width)), width - 1)
        wide, narrow = (Affine(groups, w, page, b, "channel") for w, b in ((high, HIGH), (width - high, LOW)))
        return ByChannel(wide, narrow, "size")


METHOD = Kitty
