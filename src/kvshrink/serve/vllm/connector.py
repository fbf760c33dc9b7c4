"""A vLLM KV connector: prefixes stay on disk, shrunken, also when the engine ends. For any model of plain attention.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVShrinkStore", "kv_role": "kv_both",
        "kv_connector_extra_config": {"path": "/where/to", "method": "turboquant:bits=4", "limit": "20GB"}}'

Blocks go by vLLM's own hashes, which know adapters, images and `cache_salt`. A block is copied out of the pool when its
last token is computed, and encoded and written in a thread; loads run in another while the request waits.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvshrink.errors import SettingError
from kvshrink.fit.source import local_folder
from kvshrink.serve.prefixes import PrefixStore
from kvshrink.serve.records import PageRecords
from kvshrink.serve.settings import StoreSettings, identity
from kvshrink.serve.source import records_of
from kvshrink.serve.vllm import why_not
from kvshrink.serve.vllm.blocks import layers_of
from kvshrink.serve.vllm.moving import Mover
from kvshrink.serve.vllm.planning import Orders, Planner
from kvshrink.serve.vllm.stats import StoreStats

log = logging.getLogger(__name__)


@dataclass
class Sent(Orders, KVConnectorMetadata):
    """Orders as vLLM hands them from the scheduler to workers."""


class KVShrinkStore(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _check(vllm_config)
        self.settings = StoreSettings.of(self._kv_transfer_config.kv_connector_extra_config)
        self.method, self.config = self.settings.method.made(), vllm_config
        self.folder = local_folder(vllm_config.model_config.model, vllm_config.model_config.revision)
        self.store = PrefixStore(self.settings.path, self.settings.limit)
        # a file that is gone or damaged is computed again, not a request that fails
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self.mover: Mover | None = None
        self.told: dict[str, int] = {}
        self.planner: Planner | None = None
        if role == KVConnectorRole.SCHEDULER:
            tokens = vllm_config.cache_config.block_size
            same = identity(self.folder, self.method, self.settings.exact, tokens=tokens, **_engine(vllm_config))
            self.planner = Planner(self.store, same, tokens, Sent)

    # --- the scheduler's side ---

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self.planner is not None
        found = self.planner.matched(request, num_computed_tokens)
        return found, found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.planner is not None
        if num_external_tokens:
            self.planner.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        assert self.planner is not None
        return self.planner.step(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        assert self.planner is not None
        self.planner.finished(request.request_id)
        return False, None  # what is to be kept was copied

    # --- the worker's side ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = layers_of(self.config, kv_caches, self._kv_cache_config)
        records = None if self.method is None else records_of(self.folder, self.method)
        if records is not None:
            _check_records(records, layers, self.config.cache_config.block_size)
        self.mover = Mover(self.store, layers, records, self.settings.exact)
        log.info("kvshrink: prefixes are kept in %s by %s.", self.store.folder, self.settings.method.text)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for name, blocks in self._orders().loads.items():
            self._mover.load(name, blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        self._mover.save(self._orders().saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """A request whose load failed is named, not its blocks: their numbers mean nothing where there are groups."""
        ended = self._mover.loaded(self._orders().idle)
        failed = {name for name, whole in ended.items() if not whole}
        return KVConnectorTransferResults(finished_recving=set(ended), failed_recving=failed)

    def reset_cache(self) -> bool:
        """What is stored is of weights that may have changed in memory: nothing of it is read again by this engine."""
        if self.planner is not None:
            self.planner.identity = f"{self.planner.identity} {uuid4().hex}"
            self.planner.followed.clear()
        return True

    def shutdown(self) -> None:
        if self.mover is not None:
            self.mover.close()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.mover is None:
            return None
        now = {**self.store.counts, "blocks_dropped": self.mover.dropped}
        fresh, self.told = {name: n - self.told.get(name, 0) for name, n in now.items()}, now
        return StoreStats(data=fresh) if any(fresh.values()) else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return StoreStats(data=data or {})

    @property
    def _mover(self) -> Mover:
        assert self.mover is not None, "vLLM has not registered its caches"
        return self.mover

    def _orders(self) -> Orders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        return orders


def _engine(config: Any) -> dict[str, str]:
    """What else of an engine a block's content depends on."""
    model, cache = config.model_config, config.cache_config
    return {
        "config": model.hf_config.to_json_string(),  # with what was overridden
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "load_format": str(config.load_config.load_format),
    }


def _check(config: Any) -> None:
    """Raise SettingError for an engine whose blocks cannot be kept."""
    if (found := why_not()) is not None:
        raise SettingError(found)
    parallel, cache = config.parallel_config, config.cache_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    rounded = cache.cache_dtype not in ("auto", "bfloat16", "float16")
    refused = {
        f"{ranks} ranks, each of which has a part of a block": ranks > 1,
        f"a cache of {cache.cache_dtype}, which is rounded already": rounded,
        f"blocks hashed by {cache.prefix_caching_hash_algo}, which differ from run to run": not _lasting(cache),
        f"speculation by {getattr(config.speculative_config, 'method', '')}": config.speculative_config is not None,
    }
    for what, yes in refused.items():
        if yes:
            raise SettingError(f"KVShrinkStore cannot keep prefixes of an engine with {what}. Turn that off.")


def _lasting(cache: Any) -> bool:
    return str(cache.prefix_caching_hash_algo).startswith("sha256")


def _check_records(records: PageRecords, layers: Iterable[int], tokens: int) -> None:
    known, there = sorted(i for part in records.alike for i in part.layers), sorted(layers)
    if known != there:
        raise SettingError(
            f"vLLM caches {len(there)} layers of this model, transformers {len(known)}. It is not supported."
        )
    if tokens % records.page:
        raise SettingError(
            f"blocks of {tokens} tokens are no whole pages of {records.page}. Give --block-size {records.page}."
        )
