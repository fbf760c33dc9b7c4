"""The exact tokens of a layer in vLLM's pool: a cache layer of its own, whose blocks go when the window has passed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import SlidingWindowSpec


class WindowLayer(nn.Module, AttentionLayerBase):
    """Has blocks, and computes nothing. make: the spec of its blocks, from vLLM's config."""

    def __init__(self, prefix: str, make: Callable[[Any], SlidingWindowSpec], backend: type) -> None:
        super().__init__()
        known = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in known, f"{prefix} is there twice"
        known[prefix] = self
        self.prefix, self.make, self.backend = prefix, make, backend
        self.kv_cache, self.impl = torch.tensor([]), None

    def get_attn_backend(self) -> Any:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> SlidingWindowSpec:
        return self.make(vllm_config)

    def write(self, keys: Tensor, values: Tensor, there: Tensor | None, block: Tensor, slot: Tensor) -> None:
        """New tokens [n, h, d] to their places. there: which of them have one; None: all."""
        rows = torch.cat([keys, values], -1)
        self.kv_cache[block, :, slot] = (rows if there is None else rows[there]).to(self.kv_cache.dtype)
