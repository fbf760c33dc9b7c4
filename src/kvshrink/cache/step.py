"""What one step hands from the model to a layer, and from a layer to attention."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kvshrink.cache.body import Shelf
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import Asked
from kvshrink.store.lasting import lasting
from kvshrink.store.modes import at_once, autocast_on

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


def appending(update: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A layer's `update`, whatever mode the caller is in: what it stores lasts, and has the model's dtype."""
    update = lasting(update)

    @at_once
    @functools.wraps(update)
    def run(layer: "CompressedLayer", keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not autocast_on():
            return update(layer, keys, values, *args, **kwargs)
        # projections come rounded, keys as their RoPE left them; others' attention gets both as DynamicCache gives them
        stored, given = layer.shape.dtype, keys.dtype
        found = update(layer, keys.to(stored), values.to(stored), *args, **kwargs)
        return found if hasattr(found[0], "_kvshrink") else (found[0].to(given), found[1].to(given))

    return run
