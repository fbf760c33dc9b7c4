"""What of vLLM is changed so that attention layers get our pages: two methods of its Attention, for engines that ask.

    --block-size 32 --additional-config '{"kvshrink": {"artifact": "/a/folder", "prefill": "chunk"}}'

vLLM gives a backend no way to say a layer's bytes by its name, so that both are wrapped; their arguments are checked.
"""

import dataclasses
import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvshrink.errors import SettingError
from kvshrink.fit.source import local_folder
from kvshrink.methods.artifact import Artifact
from kvshrink.serve.ranks import of_rank
from kvshrink.serve.records import Alike, PageRecords
from kvshrink.serve.settings import EngineSettings
from kvshrink.serve.source import records_of
from kvshrink.serve.vllm.backend import KVShrinkBackend, Pages
from kvshrink.serve.vllm.specs import PAGE, PageSpec, WindowSpec, register_specs
from kvshrink.serve.vllm.window import WindowLayer

log = logging.getLogger(__name__)
ROUND = 16  # bytes: vLLM clears pages in words, and kernels read 16 at a time


def install() -> None:
    """Once in a process. Raises SettingError where vLLM's methods are not those that this is written for."""
    if hasattr(Attention, "_kvshrink"):
        return
    init, spec = Attention.__init__, Attention.get_kv_cache_spec
    wanted = {"attn_backend", "attn_type", "per_layer_sliding_window", "kv_sharing_target_layer_name"}
    if missing := wanted - set(inspect.signature(init).parameters):
        raise SettingError(f"vLLM's Attention takes no {sorted(missing)[0]}: it is of another version.")
    if list(inspect.signature(spec).parameters) != ["self", "vllm_config"]:
        raise SettingError("vLLM's Attention.get_kv_cache_spec takes other arguments: it is of another version.")
    register_backend(AttentionBackendEnum.CUSTOM, f"{KVShrinkBackend.__module__}.{KVShrinkBackend.__name__}")
    register_specs()

    @functools.wraps(init)
    def wrapped_init(self: Any, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        given = (config.additional_config or {}).get("kvshrink")
        if given is None:
            return init(self, *args, **kwargs)
        settings = EngineSettings.of(given)
        _check(config)
        asked = inspect.signature(init).bind(self, *args, **{**kwargs, "attn_backend": KVShrinkBackend})
        init(*asked.args, **asked.kwargs)
        _give_pages(self, config, settings, asked.arguments)

    @functools.wraps(spec)
    def wrapped_spec(self: Any, vllm_config: Any) -> Any:
        pages = getattr(self, "kvshrink", None)
        if pages is None:
            return spec(self, vllm_config)
        size = state_bytes(pages.records)
        return PageSpec(
            window=pages.window,
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=size // 2,
            dtype=torch.uint8,
            tokens_per_state=PAGE,
            state_content_bytes=size,
        )

    Attention.__init__, Attention.get_kv_cache_spec, Attention._kvshrink = wrapped_init, wrapped_spec, True
    latents = MLAAttention.__init__

    @functools.wraps(latents)
    def refused(self: Any, *args: Any, **kwargs: Any) -> None:
        if (get_current_vllm_config().additional_config or {}).get("kvshrink") is not None:
            raise SettingError('kvshrink\'s pages cannot serve latents of all heads (MLA). Leave "kvshrink" out.')
        latents(self, *args, **kwargs)

    MLAAttention.__init__ = refused


def state_bytes(records: Alike) -> int:
    """Bytes of a page of a layer in vLLM's pool: some also where all bits are other layers'."""
    return max(1, -(-records.layout.size // ROUND)) * ROUND


def _give_pages(layer: Any, config: Any, settings: EngineSettings, given: dict[str, Any]) -> None:
    """An attention layer its records and its window."""
    name, dtype = layer.layer_name, config.model_config.dtype
    if getattr(layer, "sliding_window", None) is not None or given.get("kv_sharing_target_layer_name") is not None:
        raise SettingError(
            f"{name} has a sliding window, or another layer's cache: kvshrink's pages are for plain attention."
        )
    if (
        given.get("attn_type", "decoder") != "decoder"
        or given.get("alibi_slopes") is not None
        or given.get("sinks") is not None
    ):
        raise SettingError(f"{name} is no attention of a decoder with plain scores: kvshrink's pages cannot serve it.")
    folder = local_folder(config.model_config.model, config.model_config.revision)
    records = records_for(folder, settings, dtype)
    sinks, window = records.method.sinks, records.method.window
    part = records.at(extract_layer_index(name))
    if part.codecs is None:
        raise SettingError(f"{name} is no layer that {settings.method.text} stores: kvshrink's pages cannot serve it.")
    parallel = config.parallel_config
    ranks = max(1, part.shape.heads // layer.num_kv_heads)  # of which several are alike where there are fewer heads
    place = get_tensor_model_parallel_rank() * ranks // parallel.tensor_parallel_size
    part = _share(part, place, ranks, records.method)
    if (part.shape.heads, part.shape.head_dim) != (layer.num_kv_heads, layer.head_size):
        raise SettingError(
            f"{name} has {layer.num_kv_heads} KV heads of {layer.head_size}, the model's files {part.shape}."
        )
    shape = {"num_kv_heads": layer.num_kv_heads, "head_size": layer.head_size, "dtype": dtype}
    make = functools.partial(WindowSpec, sliding_window=window + PAGE, sinks=sinks, **shape)
    kept = WindowLayer(f"{name}.kvshrink_window", lambda c: make(block_size=c.cache_config.block_size), KVShrinkBackend)
    layer.kvshrink = Pages(part, kept, window, sinks, settings.prefill == "window")


_share = functools.cache(of_rank)  # layers that are stored alike have one of them


@functools.cache
def records_for(folder: Path, settings: EngineSettings, dtype: torch.dtype) -> PageRecords:
    """Of all layers of a model, once in a process."""
    method = settings.method.made()
    if method is None:
        raise SettingError('"none" has no pages. Leave "kvshrink" out, or name a method.')
    own = method.method if isinstance(method, Artifact) else method
    own = own if settings.sinks is None else dataclasses.replace(own, sinks=settings.sinks)
    if own.page != PAGE or own.sinks > PAGE:
        raise SettingError(
            f"pages of {own.page} tokens and {own.sinks} sinks: vLLM's blocks take {PAGE}, and at most {PAGE} sinks."
        )
    records = records_of(
        folder, dataclasses.replace(method, method=own) if isinstance(method, Artifact) else own, dtype
    )
    what = settings.method.text, settings.prefill, records.nbytes
    log.info("kvshrink: %s, prompts by %s, %d bytes a page of all layers", *what)
    return records


def _check(config: Any) -> None:
    """Raise SettingError for an engine that these pages cannot serve."""
    size, kind = config.cache_config.block_size, config.cache_config.cache_dtype
    parallel = config.parallel_config
    shares = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    hybrid = config.scheduler_config.disable_hybrid_kv_cache_manager
    refused = {
        f"{parallel.pipeline_parallel_size} stages of a pipeline": parallel.pipeline_parallel_size > 1,
        f"{max(shares)} ranks, each of which has a part of the tokens": max(shares) > 1,
        "speculation, which takes tokens back that were stored": config.speculative_config is not None,
        "a KV connector, which would move pages as keys and values": config.kv_transfer_config is not None,
        "one group for all layers (--disable-hybrid-kv-cache-manager)": hybrid is True,
        f"a cache of {kind}": kind not in ("auto", "bfloat16", "float16"),
    }
    for what, yes in refused.items():
        if yes:
            raise SettingError(f"kvshrink's pages cannot serve {what}. Turn that off.")
    if size is None or size % PAGE:
        raise SettingError(f"blocks of {size} tokens are no whole pages of {PAGE}. Start with --block-size {PAGE}.")
