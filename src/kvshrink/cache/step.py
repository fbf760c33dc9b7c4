"""What one step hands from the model to a layer, and from a layer to attention."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvshrink.cache.rope import Rope
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.errors import CacheError
from kvshrink.methods._evidence import Judged
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.modes import at_once, autocast_on

SNAPSHOT = "_kvshrink"  # the attribute of a key tensor that carries what else attention reads


@dataclass(frozen=True)
class Staged:
    """What `update` does not receive from the model: put on the layer by the hook, taken off by `update`."""

    positions: Tensor  # int32 [b or 1, s]
    real: Tensor | None  # bool [b, s], False at pads; None if there are none
    rope: Rope | None  # None: a layer without position encoding
    own_attention: bool  # whether the model runs kvshrink's attention
    probe_queries: ProbeQueries | None = None  # by which tokens are ranked, where codecs need their importance
    hidden: Tensor | None = None  # the layer's input [b, s, n], where tokens are ranked by it
    judged: Judged | None = None  # what the model said of the new tokens when it read them again
    visual: Tensor | None = None  # bool [b, s], True where a token came from an image; None: nobody asks, or none did
    maker: Any = None  # what makes keys and values of what is cached (cache/latents.py), where our attention reads that


def appending(update: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A layer's `update`, whatever mode the caller is in: what it stores lasts, and has the model's dtype."""
    update = outside_inference_mode(update)

    @at_once
    @functools.wraps(update)
    def run(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # under autocast projections come rounded, keys as their RoPE left them
        stored, given, auto = layer.shape.dtype, keys.dtype, autocast_on()
        new = (keys.to(stored), values.to(stored)) if auto else (keys, values)
        all_keys, all_values = update(layer, *new, *args, **kwargs)
        snapshot = getattr(all_keys, SNAPSHOT, None)
        if auto and snapshot is None:  # others' attention gets both as DynamicCache gives them
            all_keys, all_values = all_keys.to(given), all_values.to(given)
        learns = next((new for new in (keys, values) if new.requires_grad), None)
        if torch.is_grad_enabled() and learns is not None and all_keys is not keys:
            all_keys = _Unlearnt.apply(all_keys, learns)  # type: ignore[no-untyped-call] # torch has no types here
            if snapshot is not None:
                setattr(all_keys, SNAPSHOT, snapshot)
        return all_keys, all_values

    return run


class _Unlearnt(torch.autograd.Function):
    """Keys, where new keys or values came from a projection that would learn: what is stored has no gradient."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, new: Tensor) -> Tensor:
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise CacheError(
            "gradients do not pass through a shrunken cache. Train without a cache (use_cache=False), or with "
            "transformers' DynamicCache."
        )
