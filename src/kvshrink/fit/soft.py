"""A codec as training sees it: the same numbers, with a gradient to the basis.

Rounding passes its gradient straight through (arXiv 1308.3432), and is left out where training does not ask for it.
"""

from typing import Any, Literal, final

from torch import Tensor

from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._roles import Codec, Stored


@final
class Soft(Codec):
    """A `PackedCodec` that stores latents [b, G, t, r] instead of pages."""

    metadata = frozenset()

    def __init__(self, codec: PackedCodec, rounds: bool) -> None:
        self.codec, self.rounds = codec, rounds

    @property
    def site(self) -> Literal["k_pre", "k_post", "v"]:
        return self.codec.site

    @property
    def width(self) -> int:
        return self.codec.width

    def encode(self, rows: Tensor, valid: Tensor | None, importance: Any = None, base: Any = None) -> Stored:
        latent = self.codec.project(rows)
        return {"latent": self.codec.packing.fake_quantize(latent) if self.rounds else latent}

    def unpack(self, stored: Stored) -> Tensor:
        return stored["latent"]

    def expand(self, latent: Tensor, heads: int) -> Tensor:
        return self.codec.expand(latent, heads)

    def page_bytes(self) -> int:
        return self.codec.page_bytes()
