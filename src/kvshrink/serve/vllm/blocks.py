"""Blocks of vLLM's pool as keys and values of tokens, whatever a backend's layout is.

Rows are written by the backend's own update. How it lays them out in a block is seen by writing numbers through it, so
that blocks can be read as well: no layout is known here by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.shapes import Float, Int

DIGIT = 128  # numbers below it are exact in every dtype of a cache


class LayerBlocks:
    """Blocks of one layer. layer: vLLM's attention layer; pool: its tensor, blocks first."""

    def __init__(self, layer: Any, pool: Tensor, tokens: int, heads: int, key_dim: int, value_dim: int) -> None:
        self.layer, self.pool, self.tokens = layer, pool, tokens
        self.shapes = (heads, tokens, key_dim), (heads, tokens, value_dim)
        self.places: tuple[Tensor, Tensor] | None = None

    def read(self, blocks: Sequence[int]) -> tuple[Float[Tensor, "p h t d"], Float[Tensor, "p h t e"]]:
        """Copies of keys and values, on the host."""
        if self.places is None:
            self.places = tuple(self._places(side) for side in (0, 1))  # type: ignore[assignment]
        assert self.places is not None
        flat = self.pool[torch.as_tensor(blocks, device=self.pool.device)].flatten(1)
        keys, values = (
            flat[:, place].view(-1, *shape).cpu() for place, shape in zip(self.places, self.shapes, strict=True)
        )
        return keys, values

    def write(self, blocks: Sequence[int], keys: Float[Tensor, "p h t d"], values: Float[Tensor, "p h t e"]) -> None:
        first = torch.as_tensor(blocks, dtype=torch.int64)[:, None] * self.tokens
        slots = (first + torch.arange(self.tokens, device="cpu")).flatten()
        self._update(self.pool, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1), slots)

    def _update(
        self, pool: Tensor, keys: Float[Tensor, "n h d"], values: Float[Tensor, "n h e"], slots: Tensor
    ) -> None:
        moved = [x.to(pool.device, pool.dtype).contiguous() for x in (keys, values)]
        self.layer.impl.do_kv_cache_update(self.layer, *moved, pool, slots.to(pool.device))

    def _places(self, side: int) -> Int[Tensor, " n"]:
        """Where in a block each number of its keys, or values, is: [heads * tokens * channels]."""
        shape, count = self.shapes[side], torch.Size(self.shapes[side]).numel()
        number, seen = torch.arange(1, count + 1, device="cpu"), torch.zeros((), dtype=torch.int64)
        scale = 1
        while scale <= count:  # a digit at a time
            digits = (number // scale % DIGIT).view(shape)
            seen = seen + scale * self._written(side, digits)
            scale *= DIGIT
        places = torch.full((count + 1,), -1, dtype=torch.int64, device="cpu")
        places[seen] = torch.arange(len(seen), device="cpu")
        if bool((places[1:] < 0).any()):
            name = type(self.layer.impl).__name__
            raise SettingError(
                f"{name} does not keep each number of a block by itself, so that blocks cannot be stored."
            )
        return places[1:].to(self.pool.device)

    def _written(self, side: int, digits: Int[Tensor, "h t c"]) -> Int[Tensor, " m"]:
        """A block of these numbers as it lies in memory, the other side's being 0."""
        block = self.pool.new_zeros((1, *self.pool.shape[1:]))
        rows = [torch.zeros(shape, device="cpu") for shape in self.shapes]
        rows[side] = digits.float()
        keys, values = (x.transpose(0, 1) for x in rows)
        self._update(block, keys, values, torch.arange(self.tokens, device="cpu"))
        return block.flatten().float().round().long().cpu()


def layers_of(
    vllm_config: Any, pools: Mapping[str, Tensor], kv_cache_config: Any
) -> dict[int, tuple[int, LayerBlocks]]:
    """{layer: (its group of blocks, its blocks)}, in order. Raises SettingError for what is no keys and values."""
    from vllm.model_executor.models.utils import extract_layer_index

    modules, size = vllm_config.compilation_config.static_forward_context, vllm_config.cache_config.block_size
    found: dict[int, tuple[int, LayerBlocks]] = {}
    if (hashed := getattr(kv_cache_config, "hash_block_size", None)) not in (None, size):
        raise SettingError(
            f"blocks are hashed by {hashed} tokens and held by {size}. Give one --block-size to all layers."
        )
    for group, own in enumerate(kv_cache_config.kv_cache_groups):
        spec = own.kv_cache_spec
        for name in own.layer_names:
            each = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            kind = type(each).__name__
            if kind not in ("FullAttentionSpec", "SlidingWindowSpec") or each.tokens_per_state != 1:
                raise SettingError(f"{name} has a {kind}: only blocks of plain keys and values can be stored.")
            value_dim = getattr(each, "head_size_v", None) or each.head_size
            shape = each.block_size, each.num_kv_heads, each.head_size, value_dim
            pool, index = pools[name], extract_layer_index(name)
            if each.block_size != size or pool.shape[0] != kv_cache_config.num_blocks:
                raise SettingError(
                    f"{name} has blocks of {each.block_size} tokens, the engine of {size}: they must be alike."
                )
            if index in found:
                raise SettingError(
                    f"two layers are number {index}, {name} the second: their blocks cannot be told apart."
                )
            found[index] = group, LayerBlocks(modules[name], pool, *shape)
    return dict(sorted(found.items()))
