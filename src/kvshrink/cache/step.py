"""What one step hands from the model to a layer, and from a layer to attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kvshrink.cache.body import Shelf
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import Asked

if TYPE_CHECKING:
    from kvshrink.cache.layer import CompressedLayer


@dataclass(frozen=True)
class Staged:
    """What `update` does not receive from the model: put on the layer by the hook, taken off by `update`."""

    positions: Tensor  # int32 [b or 1, s]
    real: Tensor | None  # bool [b, s], False at pads; None if there are none
    rope: Rope | None  # None: a layer without position encoding
    own_attention: bool  # whether the model runs kvshrink's attention
    asked: Asked | None = None  # queries that say what tokens are worth, where codecs want to know


class Handle(NamedTuple):
    """Rides on the key tensor that `update` returns: what attention must read besides that tensor."""

    layer: "CompressedLayer"
    rope: Rope | None
    shelves: list[Shelf]  # of the body before this step, the oldest first
    first: int  # column of the returned tensor's first token

    @property
    def pages(self) -> int:
        return sum(shelf.limit for shelf in self.shelves)
