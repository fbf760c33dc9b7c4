"""SAQ: fewer bits the older a token is, as a staircase: exact, 8 bits, 4 bits, 2 bits. arXiv 2410.18441

A page enters the body with 8-bit codes and loses its low bits when younger pages push it down a step. Codes lie in
planes (`_packing/planes.py`), so that a step down drops stored bytes and rounds nothing a second time: the 4-bit code
is the 8-bit code >> 4. Keys have one scale per channel over a page, values one per token and `group` channels. Nothing
is learnt.

Departures: the paper describes a staircase for multi-query attention on a KIVI-like framework, as a concept; here any
number of KV heads has it, and what its text leaves open is ours: the ages, the planes, and that the 4-bit and 2-bit
codes share the 8-bit scale, so that a 2-bit code covers a quarter of the range and its two outer ones do not reach
minimum and maximum, as codes quantised anew would. Sinks are exact.
"""

from dataclasses import dataclass
from typing import Literal, final

from kvshrink.methods._ladder import Ladder
from kvshrink.methods._packing import Packing, Planes
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV

STEPS = (8, 4, 2)


@final
@dataclass(frozen=True)
class SAQ(Quantiser):
    """8-bit codes for the first ages[0] tokens behind the window, 4-bit ones for the next ages[1], 2-bit ones beyond.

    ages: in tokens, rounded down to pages of 32; 0 leaves a step out.
    """

    ages: tuple[int, int] = (256, 1024)
    group: int = 32

    def check(self) -> None:
        super().check()
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")
        given = self.ages
        require(min(given) >= 0, f"ages={given}", "Use two numbers of tokens, 0 or more.")

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return self._planes(kv, space, STEPS[0])

    def ladder(self, kv: KV, space: Space, learnt: Fitted) -> Ladder:
        limits = (*self.ages, None)
        return tuple((self._planes(kv, space, bits), limit) for bits, limit in zip(STEPS, limits, strict=True))

    def _planes(self, kv: KV, space: Space, bits: int) -> Planes:
        axis: Literal["channel", "token"] = "channel" if kv == "key" else "token"
        return Planes(space.groups, space.width, space.page, bits, axis, min(self.group, space.width))


METHOD = SAQ
