"""AccLLM: 4-bit keys and values, and attention to the first and the recent tokens only. arXiv 2505.03745

Its KV part alone: of a sequence there are `sinks` first tokens, the last `recent` tokens behind the exact window as
4-bit codes, and that window; older pages are dropped. Nothing is learnt.

Departures: the paper's weights (2 bits), activations (8 bits) and pruning are no part of a cache. Sinks and the newest
tokens are exact. Tokens keep their own positions, as in our `streaming_llm`. Pages of 32 tokens are dropped at once, so
that the number of tokens seen varies by a page. The axes are KIVI's: keys per channel over a page, values per token and
`group` channels.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.methods._ladder import Ladder
from kvshrink.methods._packing import Packing
from kvshrink.methods._quantiser import Quantiser, Space, axes
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import one_of, require
from kvshrink.methods._stats import KV, LayerShape


@final
@dataclass(frozen=True)
class AccLLM(Quantiser):
    """`bits`-bit codes of the `recent` tokens behind the window (rounded down to pages of 32), nothing before them."""

    recent: int = 1024
    bits: int = 4
    group: int = 32

    drops_tokens: ClassVar[bool] = True
    of_latents: ClassVar[bool] = False  # the method of the latents would drop tokens, which it does not say
    budget_setting: ClassVar[str] = "recent"

    def budget_values(self, shape: LayerShape, tokens: int) -> range:
        return range(self.page, max(self.page, tokens) + 1, self.page)

    def check(self) -> None:
        super().check()
        one_of("bits", self.bits, tuple(sorted(WIDTHS)))
        require(self.recent >= self.page, f"recent={self.recent}", f"Use at least a page of {self.page} tokens.")
        require(self.group >= 1, f"group={self.group}", "Use at least 1 channel.")

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        return axes(space, self.bits, "channel" if kv == "key" else "token", self.group)

    def ladder(self, kv: KV, space: Space, learnt: Fitted) -> Ladder:
        return ((self.packing(kv, space, learnt), self.recent), (None, None))

    def pages_held(self, pages: int) -> int:
        return min(pages, self.recent // self.page)


METHOD = AccLLM
