"""StreamingLLM: keep the first tokens and the recent ones, drop what lies between. arXiv 2309.17453

The baseline that every compressing method must beat at equal bytes. Departure: the paper renumbers the positions of the
kept tokens, so that a stream may outlive the trained context; here tokens keep their own positions, so that `crop`,
padding and several turns mean what they mean for a full cache.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._bounded import Bounded
from kvshrink.methods._roles import Codec, Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import LayerShape


@final
@dataclass(frozen=True)
class StreamingLLM(Bounded):
    """`sinks` first tokens and at least `window` recent ones, exact; between window and window + 32 are held."""

    window: int = 256
    sinks: int = 4

    drops_tokens: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "window"

    def budget_values(self, shape: LayerShape, tokens: int) -> range:
        return range(1, max(1, tokens) + 1)

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec] | None:
        return None

    def pages_held(self, pages: int) -> int:
        return 0

    @classmethod
    def within(cls, held_bytes: float, shape: LayerShape, sinks: int = 4) -> "StreamingLLM":
        """The largest window whose buffer, sinks included, takes at most `held_bytes` in a layer of this shape.

        Raises SettingError if not even a window of one token does.
        """
        window = int((held_bytes - sinks * 4) // shape.token_bytes) - sinks - cls.page
        least = (1 + cls.page + sinks) * shape.token_bytes + sinks * 4
        require(window >= 1, f"StreamingLLM within {held_bytes:.0f} bytes a layer", f"It takes at least {least}.")
        return cls(window=window, sinks=sinks)


METHOD = StreamingLLM
