"""ZipCache: the tokens that attention reads most at 4 bits, the others at 2. arXiv 2405.14256

A token's importance is its normalised attention: what the last 5 % of the queries and a random 5 % pay it, by the
number of these that see it (methods/_policy.py). Keys have one scale per channel over a page's tokens of one class.
Values are channel-separable: divided by c = sqrt(max |v|) of their channel over a page (float16, one for both classes),
they have one scale per token over a head's channels. Which class a token is in takes one bit a token and head.

Departures: scales are over pages of 128 tokens, not over the whole prompt, and values' over a head, not all heads;
`share` becomes a multiple of 8 tokens of a page (0.6: 80 of 128), and the most important ones are chosen page by page.
A page that leaves the window while tokens come one by one is judged by the last query alone, as in the paper, which
then recompresses its whole cache every 100 tokens; here nothing is encoded twice. 100 to 228 recent tokens and 4 sinks
are exact, not 0 to 100 tokens. In latents of another method pages are its own 32 tokens. A prompt in chunks is judged
chunk by chunk, so that what is chosen depends on them.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._packing import Packing, Separable
from kvshrink.methods._quantiser import Quantiser, Space
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import KV, LayerShape
from kvshrink.methods.quant._classes import check_order, check_share, classes, shares

BITS = (8, 4, 3, 2, 1)


@final
@dataclass(frozen=True)
class ZipCache(Quantiser):
    """`high` bits for the `share` of most important tokens, `low` for the others, after RoPE."""

    window: int = 100
    high: int = 4
    low: int = 2
    share: float = 0.6

    page: ClassVar[int] = 128
    budget_setting: ClassVar[str] = "share"

    def budget_values(self, shape: LayerShape, tokens: int) -> tuple[float, ...]:
        return shares(self.page)

    def check(self) -> None:
        super().check()
        one_of("high", self.high, BITS)
        one_of("low", self.low, BITS)
        check_order(self.high, self.low)
        check_share(self.share)

    def packing(self, kv: KV, space: Space, learnt: Fitted) -> Packing:
        if kv == "key":
            return classes(space, self.high, self.low, self.share, "channel")
        return Separable(classes(space, self.high, self.low, self.share, "token"))


METHOD = ZipCache
