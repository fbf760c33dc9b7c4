"""Sliding-window layers, which stay transformers' own: what can be taken back, what is saved, how one is filled."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvshrink.errors import CacheError


def sliding_tensors(layer: Any) -> dict[str, Tensor]:
    """Keys and values that a layer holds."""
    return {k: t for k in ("keys", "values") if isinstance(t := getattr(layer, k, None), Tensor)}


def check_crop(layer: Any, count: int) -> None:
    """Raise CacheError if a layer cannot take back the last `count` tokens."""
    seen = layer.get_seq_length()
    if count > seen:
        raise CacheError(f"cannot crop {count} tokens: the cache holds {seen}. Crop fewer or call reset().")
    held = sliding_tensors(layer)["keys"].shape[2] if seen else 0
    if count and held - count < min(seen - count, layer.sliding_window - 1):
        raise CacheError(
            f"cannot crop {count} tokens: a layer with a sliding window of {layer.sliding_window} has let older ones "
            "go. Crop before the window is full, or call activate_past_recording() before those tokens come."
        )


def sliding_state(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain values, tensors): the tokens that the next step may see, and no more."""
    seen = layer.get_seq_length()
    if not seen:
        return {"seen": 0}, {}
    tokens = min(seen, max(1, layer.sliding_window - 1))
    tensors = {k: t[:, :, t.shape[2] - tokens :] for k, t in sliding_tensors(layer).items()}
    keys = tensors["keys"]
    return {"seen": seen, "shape": list(keys.shape[1:]), "dtype": str(keys.dtype).removeprefix("torch.")}, tensors


def restore_sliding(layer: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """From what `sliding_state` gave."""
    layer.reset()
    layer.cumulative_length = values["seen"]
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]


def joined_sliding(layers: Sequence[Any], length: int) -> Any:
    """The rows of these layers, ending together, under a common length."""
    parts = [sliding_state(layer)[1] for layer in layers]
    tokens = max(t["keys"].shape[2] for t in parts)
    found = {k: torch.cat([pad(t[k], (0, 0, tokens - t[k].shape[2], 0)) for t in parts]) for k in ("keys", "values")}
    other = copy.copy(layers[0])
    restore_sliding(other, {"seen": length}, found)
    return other


def sliding_row(layer: Any, number: int, length: int) -> Any:
    """One row alone, of so many tokens."""
    _, tensors = sliding_state(layer)
    tokens = min(length, max(1, layer.sliding_window - 1))
    other = copy.copy(layer)
    own = {k: t[number : number + 1, :, t.shape[2] - tokens :].clone() for k, t in tensors.items()}
    restore_sliding(other, {"seen": length}, own)
    return other
