"""A method's setting that holds a given share of the full cache's bytes: comparisons are made at equal real bytes.

Bytes are the method's own arithmetic (`Method.layer_bytes`, which a contract test holds against the live tensors), with
window, sinks, scales and positions. Outcomes report what was measured.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from transformers import DynamicCache

from kvshrink.attach import attach
from kvshrink.attach.factory import shapes
from kvshrink.attach.families import LayerInfo, shape_of
from kvshrink.attach.images import asks
from kvshrink.cache.passed import has_states, is_sliding, states_of
from kvshrink.errors import SettingError
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.visual import visual_bytes
from kvshrink.store.bytes import nbytes
from kvshrink.store.tokens import BYTES_PER_TOKEN

TOLERANCE = 0.05  # a target counts as reached within 5 % of it


@dataclass(frozen=True)
class Reached:
    """A method at a budget. byte_ratio: promised bytes over the full cache's; reached: whether that is the target."""

    method: Method
    byte_ratio: float
    reached: bool


def at_byte_ratio(method: Method, target: float, model: Any, tokens: int) -> Reached:
    """`method`, its budget setting (CSKV's keep, RTN's bits) such that `tokens` tokens take `target` of full bytes.

    The largest setting that stays under the target; where that is not within TOLERANCE of it, the nearest one.
    Raises SettingError for a target outside (0, 1], or if no setting fits the model.
    """
    if not 0 < target <= 1:
        raise SettingError(f"byte_ratio={target} is not possible. Use a share of bytes above 0, up to 1.")
    sizes = CacheBudget.of(model, tokens)
    method = sizes.resolved(method)
    values = method.budget_values(sizes.layers[0], tokens) if method.budget_setting else (None,)

    def setting(i: int) -> Method:
        changes: dict[str, Any] = {method.budget_setting: values[i]} if method.budget_setting else {}
        return replace(method, **changes)

    above = bisect_right(range(len(values)), target, key=lambda i: sizes.byte_ratio(setting(i)))
    near = {
        i: ratio for i in (above - 1, above) if 0 <= i < len(values) and (ratio := sizes.byte_ratio(setting(i))) > 0
    }
    if not near:
        raise SettingError(f"{name_of(method)} has no setting for this model's {sizes.layers[0].width} KV channels.")
    below = near.get(above - 1, 0.0)
    best = above - 1 if below >= (1 - TOLERANCE) * target else min(near, key=lambda i: abs(log(near[i] / target)))
    return Reached(setting(best), near[best], abs(near[best] / target - 1) <= TOLERANCE)


def promised(method: Method, model: Any, tokens: int, visual: int = 0) -> float:
    """Share of the full cache's bytes that the method promises to hold for this many tokens, of which `visual` fill
    pages that are all of images; 0 if it does not fit."""
    return CacheBudget.of(model, tokens, visual).byte_ratio(method)


@torch.no_grad()
def fixed_bytes(model: Any, layers: Sequence[LayerInfo], tokens: int) -> int:
    """Bytes that one sequence takes in layers that stay as they are: windows, and states, of which one step tells."""
    cache: Any = DynamicCache(config=model.config)
    total = 0
    for layer, info in zip(cache.layers, layers, strict=True):
        if is_sliding(layer) and info.heads:
            length = min(tokens, max(1, layer.sliding_window - 1))
            total += length * shape_of(info).token_bytes
    if any(map(has_states, cache.layers)):
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        total += nbytes(t for layer in cache.layers for t in states_of(layer).values())
    return total


@dataclass(frozen=True)
class CacheBudget:
    """What a full cache of `tokens` tokens takes; `fixed` are the bytes of layers that stay as they are.

    device: where the model is, for which methods resolve "auto". visual: tokens in pages that are all of images.
    """

    layers: list[LayerShape]
    tokens: int
    fixed: int
    device: torch.device
    visual: int = 0

    @classmethod
    def of(cls, model: Any, tokens: int, visual: int = 0) -> "CacheBudget":
        attachment = attach(model)
        layers = [shape for shape in shapes(attachment) if shape is not None]
        if not layers:
            raise SettingError("this model has no full-attention layer: there is nothing to shrink.")
        device = next(model.parameters()).device
        return cls(layers, tokens, fixed_bytes(model, attachment.layers, tokens), device, visual)

    @property
    def full(self) -> int:
        """Bytes of the full cache of one sequence."""
        return self.tokens * sum(shape.token_bytes for shape in self.layers) + self.fixed

    def resolved(self, method: Method) -> Method:
        """The method as a fit on this model would start from it."""
        return method.resolve_auto(self.layers, self.device)

    def held(self, method: Method) -> int:
        """Bytes that the method promises to hold of one sequence; 0 for a setting that is too small for the model."""
        try:
            method = self.resolved(method)
            every = [(method.at_layer(i, len(self.layers)), s) for i, s in enumerate(self.layers)]
            parts = [
                n * (m.layer_bytes(s, {}, self.tokens) + visual_bytes(m, s, {}, self.tokens, self.visual))
                for (m, s), n in Counter(every).items()
            ]
        except SettingError:
            return 0
        by_token = BYTES_PER_TOKEN + (asks(method) and self.visual > 0)  # and which came from images
        return sum(parts) + by_token * self.tokens + self.fixed

    def byte_ratio(self, method: Method) -> float:
        """Share of bytes that the method promises to hold; 0 for a setting that is too small for the model."""
        return self.held(method) / self.full
