"""What vLLM's scheduler knows of our blocks: which stay, and which a later request with the same tokens may have.

Blocks of pages, and of the exact tokens beside them, a request's first ones among them where they are sinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvshrink.serve.pool import pages_of

PAGE = 32
Blocks = tuple[list[KVCacheBlock], ...]  # of each group


def written(tokens: int, window: int) -> int:
    """How many of a request's tokens are in pages that are written."""
    return int(pages_of(np.array(tokens), window, PAGE)) * PAGE


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """Pages, each of which is written when it has left a window of so many tokens."""

    window: int = 0

    @classmethod
    def merge(cls, specs: list["PageSpec"]) -> "PageSpec":
        return replace(super().merge(specs), window=specs[0].window)


class PageManager(FullAttentionManager):
    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer blocks whose pages are written. vLLM offers all whose tokens are computed; the last of a request that
        ends has no page, and a request that goes on with the same tokens may be given it for one that has."""
        super().cache_blocks(request, written(num_tokens, self.kv_cache_spec.window), *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """The recent tokens: the window, and a page that is about to leave it. sinks: tokens whose block stays as well, for
    as long as the request is there."""

    sinks: int = 0

    def max_admission_blocks_per_request(self, *args: Any, **kwargs: Any) -> int:
        return int(super().max_admission_blocks_per_request(*args, **kwargs)) + (self.sinks > 0)


class WindowManager(SlidingWindowManager):
    def cache_blocks(
        self, request: Any, num_tokens: int, *args: Any, replay_boundaries: Sequence[int], **kwargs: Any
    ) -> None:
        """Keep what hits begin with. vLLM keeps it where a prompt that is sent again could go on, if all its blocks
        were there; the last ones' pages are written later, or never."""
        window = self.kv_cache_spec.sliding_window - PAGE
        ends = {end for to in replay_boundaries for end in (to, *range(written(to, window), to, PAGE))}
        if self.kv_cache_spec.sinks:
            ends.add(self.block_size)
        super().cache_blocks(request, num_tokens, *args, replay_boundaries=sorted(ends), **kwargs)

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **kwargs: Any) -> tuple[Blocks, int]:
        """With sinks nothing, where the first block is gone: by then it is not the window that lacks tokens."""
        found, length = super().find_longest_cache_hit(*args, **kwargs)
        pool, spec = kwargs["block_pool"], kwargs["kv_cache_spec"]
        if not spec.sinks or not length or not found[0][0].is_null:
            return found, length
        hashes = resolve_block_hashes(
            kwargs["block_hashes"],
            pool.hash_block_size,
            spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=kwargs["alignment_tokens"],
        )
        first = pool.get_cached_block(hashes[0], kwargs["kv_cache_group_ids"])
        if not first:
            return tuple([] for _ in found), 0
        for blocks, block in zip(found, first, strict=True):
            blocks[0] = block
        return found, length

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """And the first block, which may be free until it is taken."""
        count = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        return int(count) + self._get_num_evictable_blocks(self._first_of(new_computed_blocks))

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        first = self._first_of(new_computed_blocks)
        self.block_pool.touch(first)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        self.req_to_blocks[request_id][: len(first)] = first

    def _first_of(self, blocks: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """The first block of a hit, where it has sinks and the window has passed it."""
        passed = self.get_num_skipped_tokens(len(blocks) * self.block_size) >= self.block_size
        return list(blocks[:1]) if self.kv_cache_spec.sinks and passed else []

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        first = int(self.kv_cache_spec.sinks > 0)
        self._remove_blocks_in_range(request_id, first, min(skipped, len(self.req_to_blocks[request_id])))


def register_specs() -> None:
    KVCacheSpecRegistry._ensure_registered()  # it enters vLLM's own only where none is known
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=SlidingWindowSpec)
    KVCacheSpecRegistry.register(PageSpec, PageManager, uniform_type_base_spec=FullAttentionSpec)
