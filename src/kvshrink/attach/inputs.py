"""Pre-hook of the decoder: uses of a cache that transformers would cut, drop or read as something else."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.asking import names_of
from kvshrink.cache.cache import KVCache
from kvshrink.cache.rope import plain
from kvshrink.errors import CacheError
from kvshrink.store.modes import at_once


def by_name(module: Any, args: tuple, kwargs: dict) -> Mapping[str, Any]:
    """A decoder's arguments by the names that it gives them, also those that came by their place."""
    return {**dict(zip(_names(module.__class__), args, strict=False)), **kwargs} if args else kwargs


def extra(module: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that a module does not name itself, but hands on."""
    return {k: v for k, v in kwargs.items() if k not in names_of(module.__class__)}


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def check_use(module: Any, args: tuple, kwargs: dict) -> None:
    """Raise CacheError where the cache would be dropped, or where a prompt was cut by it."""
    given = by_name(module, args, kwargs)
    found = given.get("past_key_values")
    if isinstance(found, KVCache):
        _check(module, given, found)


@at_once
def _check(module: Any, given: Mapping[str, Any], cache: KVCache) -> None:
    if module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
        raise CacheError(
            "gradient checkpointing drops the cache in train mode. "
            "Call model.eval() or model.gradient_checkpointing_disable() first."
        )
    seen = cache.get_seq_length()
    if seen and _whole_again(given, seen):
        raise CacheError(
            f"the whole text was passed again to a cache that holds {seen} tokens of it, as assisted decoding does in "
            "a second turn. Make a new cache or call reset(), or decode without assistance."
        )
    prompt = _cut(given, cache, seen)
    if prompt is not None and prompt <= seen:
        raise CacheError(
            f"the cache holds {seen} tokens, the prompt has {prompt}: make a new cache or call reset(), "
            "or pass the whole text so far."
        )


def _whole_again(arguments: Mapping[str, Any], seen: int) -> bool:
    """Whether more tokens than the cache holds come without a mask and are counted from 0, as those before were."""
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or arguments.get("attention_mask") is not None or positions.shape[-1] <= seen:
        return False
    rows = positions.reshape(-1, positions.shape[-1])
    return bool((rows == torch.arange(rows.shape[1], device=rows.device)).all())


def _cut(arguments: Mapping[str, Any], cache: KVCache, seen: int) -> int | None:
    """Length of the prompt, where `generate` took its first tokens for those in the cache though it is shorter.

    Of n tokens it leaves those from `seen - n` on, or none, and their positions with them.
    """
    given, positions = arguments.get("input_ids"), arguments.get("position_ids")
    if not isinstance(given, Tensor) or not isinstance(positions, Tensor) or given.dim() != 2 or not given.shape[0]:
        return None
    if not given.shape[1]:
        return positions.shape[-1] or None
    if arguments.get("attention_mask") is not None or (positions.is_cuda and given.shape[1] == 1):
        return None
    rows = positions.reshape(-1, positions.shape[-1])
    first = int(rows[0, 0])
    prompt = seen - first
    if not 0 < first < seen or prompt - first != given.shape[1]:
        return None
    if cache.table.length == seen and int(plain(cache.table.positions[:, seen - 1]).max()) != seen - 1:
        return None  # positions of the caller's own: the tokens before were not counted one by one either
    return prompt if bool((rows == torch.arange(first, prompt, device=rows.device)).all()) else None
