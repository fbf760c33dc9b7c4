"""Layers that stay transformers' own: sliding and chunked attention, recurrences, convolutions, and empty ones.

Some hold tokens, some a state of one size (`conv_states`, `recurrent_states`), some both, some nothing. What can be
taken back, what is saved, and rows that come and go.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvshrink.errors import CacheError
from kvshrink.shapes import Int
from kvshrink.store.names import under

STATES = ("conv", "recurrent")


def has_states(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def is_sliding(layer: Any) -> bool:
    return hasattr(layer, "sliding_window")


def tokens_seen(layer: Any) -> int | None:
    """How many tokens a layer has seen; None: it does not count them."""
    return layer.get_seq_length() if is_sliding(layer) else None


def states_of(layer: Any) -> dict[str, Tensor]:
    """The states that a layer holds."""
    if not has_states(layer):
        return {}
    every = {f"{name}.{i}": t for name in STATES for i, t in getattr(layer, f"{name}_states").items()}
    return {k: t for k, t in every.items() if t is not None}


def passed_tensors(layer: Any) -> dict[str, Tensor]:
    """All that a layer holds."""
    rows = {k: t for k in ("keys", "values") if isinstance(t := getattr(layer, k, None), Tensor)}
    return rows | states_of(layer)


def kind_name(layer: Any) -> str:
    """As a report calls it."""
    return "sliding" if is_sliding(layer) else "state" if has_states(layer) else "no cache"


# --- taking back ---


def check_crop(layer: Any, count: int) -> None:
    """Raise CacheError if a layer cannot take back the last `count` tokens."""
    if has_states(layer) and count:
        _check_states(layer, count)
    if not is_sliding(layer):
        return
    seen = layer.get_seq_length()
    if count > seen:
        raise CacheError(f"cannot crop {count} tokens: the cache holds {seen}. Crop fewer or call reset().")
    held = passed_tensors(layer)["keys"].shape[2] if seen else 0
    if count and held - count < min(seen - count, layer.sliding_window - 1):
        raise CacheError(
            f"cannot crop {count} tokens: a layer with a sliding window of {layer.sliding_window} has let older ones "
            "go. Crop before the window is full, or call activate_past_recording() before those tokens come."
        )


def _check_states(layer: Any, count: int) -> None:
    if any(t is not None for t in layer.recurrent_states.values()):
        raise CacheError(
            f"cannot crop {count} tokens: a layer of this model is a recurrence, whose state cannot go back. Fork the "
            "cache (copy.deepcopy) before tokens that may be taken back."
        )
    spare = [t.shape[-1] - layer.conv_kernel_size[i] for i, t in layer.conv_states.items() if t is not None]
    if not layer.record_past or min(spare, default=0) < count:
        raise CacheError(
            f"cannot crop {count} tokens: a convolution of this model has let what was before them go. Call "
            "activate_past_recording() before those tokens come."
        )


def clear_states(layer: Any) -> None:
    """Hold no state, of any number of rows; transformers' own `reset` keeps zeros of as many rows as there were."""
    for name in STATES:
        for index in getattr(layer, f"{name}_states"):
            getattr(layer, f"{name}_states")[index] = None
            getattr(layer, f"is_{name}_states_initialized")[index] = False
            layer.has_previous_state[index] = False


def lasting(layer: Any) -> None:
    """Let a step outside inference mode write over states that were made within it."""
    if torch.is_inference_mode_enabled():
        return
    for k, tensor in states_of(layer).items():
        if tensor.is_inference():
            name, i = k.split(".")
            getattr(layer, f"{name}_states")[int(i)] = tensor.clone()


# --- saving ---


def passed_state(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain values, tensors): what the next step may read, and no more."""
    values, tensors = states_state(layer)
    if is_sliding(layer):
        seen = layer.get_seq_length()
        values["seen"] = seen
        if seen:
            tokens = min(seen, max(1, layer.sliding_window - 1))
            rows = {k: getattr(layer, k)[:, :, -tokens:] for k in ("keys", "values")}
            tensors |= rows
            values |= {"shapes": [list(t.shape[1:]) for t in rows.values()], "dtype": _named(rows["keys"].dtype)}
    return values, tensors


def states_state(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain values, tensors) of the states alone."""
    found = {k: t.clone() for k, t in states_of(layer).items()}  # which the next step writes over
    for k, t in found.items():
        name, i = k.split(".")
        size = layer.conv_kernel_size[int(i)] if name == "conv" else None
        if size is not None:  # while it records it may hold more, or of a short prompt less
            found[k] = pad(t, (max(0, size - t.shape[-1]), 0))[..., -size:]
    kinds = {k: [_named(t.dtype), list(t.shape[1:])] for k, t in found.items()}
    return ({"states": kinds} if has_states(layer) else {}), {f"states.{k}": t for k, t in found.items()}


def restore_passed(layer: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """From what `passed_state` gave."""
    layer.reset()
    if has_states(layer):
        clear_states(layer)
    if is_sliding(layer):
        layer.cumulative_length = values["seen"]
        if values["seen"]:
            layer.lazy_initialization(tensors["keys"], tensors["values"])
            layer.keys, layer.values = tensors["keys"], tensors["values"]
    restore_states(layer, under(tensors, "states."))


def restore_states(layer: Any, tensors: dict[str, Tensor]) -> None:
    for k, tensor in tensors.items():
        name, i = k.split(".")
        index = int(i)
        getattr(layer, f"{name}_states")[index] = tensor
        getattr(layer, f"is_{name}_states_initialized")[index] = True
        layer.has_previous_state[index] = True
        layer.device, layer.dtype = tensor.device, tensor.dtype
        if name == "conv":
            layer.conv_kernel_size[index] = tensor.shape[-1]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def learning(layer: Any) -> None:
    """Let gradients pass through a layer that is about to be given states: transformers writes over those before, which
    a gradient may need."""

    def update_conv_state(conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        every = torch.cat([layer.conv_states[state_idx], conv_states], -1)
        layer.conv_states[state_idx] = every[..., -layer.conv_kernel_size[state_idx] :]
        return every

    def update_recurrent_state(recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        layer.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    layer.update_conv_state, layer.update_recurrent_state = update_conv_state, update_recurrent_state


# --- rows ---


def select_rows(layer: Any, index: Int[Tensor, " n"]) -> None:
    """Keep these rows, in this order; a row may come more than once."""
    if is_sliding(layer) and isinstance(getattr(layer, "keys", None), Tensor):
        layer.keys, layer.values = (t.index_select(0, index.to(t.device)) for t in (layer.keys, layer.values))
    select_states(layer, index)


def select_states(layer: Any, index: Int[Tensor, " n"]) -> None:
    for k, tensor in states_of(layer).items():
        name, i = k.split(".")
        getattr(layer, f"{name}_states")[int(i)] = tensor.index_select(0, index.to(tensor.device))


def joined_passed(layers: Sequence[Any], length: int) -> Any:
    """The rows of these layers, ending together, under a common length."""
    parts = [passed_state(layer)[1] for layer in layers]
    if is_sliding(layers[0]):
        tokens = max(t["keys"].shape[2] for t in parts)
        for part in parts:
            part |= {k: pad(part[k], (0, 0, tokens - part[k].shape[2], 0)) for k in ("keys", "values")}
    found = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    other = copy.deepcopy(layers[0])
    restore_passed(other, {"seen": length}, found)
    return other


def passed_row(layer: Any, number: int, length: int) -> Any:
    """One row alone, of so many tokens."""
    tensors = passed_state(layer)[1]
    own = {k: t[number : number + 1].clone() for k, t in tensors.items()}
    if is_sliding(layer):
        tokens = min(length, max(1, layer.sliding_window - 1))
        own |= {k: own[k][:, :, -tokens:].clone() for k in ("keys", "values") if k in own}
    other = copy.deepcopy(layer)
    restore_passed(other, {"seen": length}, own)
    return other
