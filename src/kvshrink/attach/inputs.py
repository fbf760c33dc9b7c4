"""Pre-hook of the decoder: uses of a cache that transformers would cut, drop or read as something else."""

from typing import Any

import torch
from torch import Tensor

from kvshrink.cache.cache import KVCache
from kvshrink.errors import CacheError
from kvshrink.store.modes import at_once


def check_use(module: Any, args: tuple, kwargs: dict) -> None:
    """Raise CacheError where the cache would be dropped, or where a prompt was cut by it."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, KVCache):
        _check(module, kwargs, cache)


@at_once
def _check(module: Any, kwargs: dict, cache: KVCache) -> None:
    if module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
        raise CacheError(
            "gradient checkpointing drops the cache in train mode. "
            "Call model.eval() or model.gradient_checkpointing_disable() first."
        )
    prompt, seen = _cut(kwargs), cache.get_seq_length()
    if prompt is not None and prompt <= seen:
        raise CacheError(
            f"the cache holds {seen} tokens, the prompt has {prompt}: make a new cache or call reset(), "
            "or pass the whole text so far."
        )


def _cut(kwargs: dict) -> int | None:
    """Length of the prompt, where `generate` took its first tokens for those in the cache though it is shorter.

    Of n tokens it leaves those from `seen - n` on, or none, and their positions with them.
    """
    given, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
    if not isinstance(given, Tensor) or not isinstance(positions, Tensor) or given.dim() != 2 or not given.shape[0]:
        return None
    if not given.shape[1]:
        return positions.shape[-1] or None
    if kwargs.get("attention_mask") is not None or (positions.is_cuda and given.shape[1] == 1):
        return None
    seen, rows = kwargs["past_key_values"].get_seq_length(), positions.reshape(-1, positions.shape[-1])
    first = int(rows[0, 0])
    prompt = seen - first
    if not 0 < first < seen or prompt - first != given.shape[1]:
        return None
    return prompt if bool((rows == torch.arange(first, prompt, device=rows.device)).all()) else None
