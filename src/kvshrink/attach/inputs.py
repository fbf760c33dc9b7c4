"""Pre-hook of the decoder: uses of a cache that transformers would cut, drop or read as something else."""

from typing import Any

from torch import Tensor

from kvshrink.cache.cache import KVCache
from kvshrink.errors import CacheError


def check_use(module: Any, args: tuple, kwargs: dict) -> None:
    """Raise CacheError where the cache would be dropped, or where a prompt was cut to nothing by it."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, KVCache):
        return
    if module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
        raise CacheError(
            "gradient checkpointing drops the cache in train mode. "
            "Call model.eval() or model.gradient_checkpointing_disable() first."
        )
    given, mask, seen = kwargs.get("input_ids"), kwargs.get("attention_mask"), cache.get_seq_length()
    cut = isinstance(given, Tensor) and given.dim() == 2 and given.shape[0] and not given.shape[1]
    if cut and isinstance(mask, Tensor) and mask.dim() == 2 and 0 < mask.shape[1] <= seen:
        raise CacheError(
            f"the cache holds {seen} tokens, the prompt has {mask.shape[1]}: make a new cache or call reset(), "
            "or pass the whole text so far."
        )
