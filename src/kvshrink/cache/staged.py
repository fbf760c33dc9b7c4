"""What the attention hook hands to a cache layer before each step."""

from dataclasses import dataclass

from torch import Tensor

from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import Asked


@dataclass(frozen=True)
class Staged:
    """What `update` does not receive from the model: put on the layer by the hook, taken off by `update`."""

    positions: Tensor  # int32 [b or 1, s]
    real: Tensor | None  # bool [b, s], False at pads; None if there are none
    rope: Rope | None  # None: a layer without position encoding
    own_attention: bool  # whether the model runs kvshrink's attention
    asked: Asked | None = None  # queries that say what tokens are worth, where codecs want to know
