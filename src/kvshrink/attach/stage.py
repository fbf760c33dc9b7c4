"""Pre-hooks: what one step hands to a cache that transformers does not pass, and input refused before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.columns import check_columns, new_tokens, positions_of
from kvshrink.attach.families import LayerInfo, queries
from kvshrink.attach.implementation import is_ours
from kvshrink.attach.inputs import by_name, extra
from kvshrink.attach.keywords import check_keywords
from kvshrink.attach.owner import check_owner
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.errors import CacheError
from kvshrink.store.modes import at_once, own_modes


class Stage:
    """Pre-hook of one attention module: stages positions and pads on the cache layer that `update` will reach."""

    def __init__(self, info: LayerInfo, model: str) -> None:
        self.index, self.rope, self.model = info.module.layer_idx, info.rope, model
        self.compressed = info.compressed

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        if self.compressed and isinstance(cache, KVCache):
            self._stage(module, args, kwargs, cache)

    @at_once
    @own_modes
    def _stage(self, module: Any, args: tuple, kwargs: dict, cache: KVCache) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        b, s = hidden.shape[:2]
        seen = cache.layers[self.index].get_seq_length()
        positions = positions_of(module, kwargs.get("position_ids"))
        own = is_ours(module)
        layer, probe_queries = cache.layers[self.index], None
        if own and isinstance(layer, CompressedLayer) and layer.shrunken:
            # refused here, where this layer does not hold the new tokens yet
            check_keywords(extra(module, kwargs), type(module).__name__)
        # the token table is one for all layers; only the step's first compressed layer extends it
        real = new_tokens(kwargs.get("attention_mask"), b, s) if cache.table.length == seen else None
        rope = self.rope
        if rope is not None and rope.inv_freq.device != hidden.device:  # the model was moved after attach
            rope = self.rope = type(rope)(rope.inv_freq.to(hidden.device), rope.scaling, rope.interleaved)
        if isinstance(layer, CompressedLayer) and (rows := layer.probes(s)) is not None:
            probe_queries = probe_queries_of(module, hidden, positions, rope, rows.to(hidden.device))
        cache.stage(self.index, positions, real, rope, own, self.model, probe_queries)


@torch.no_grad()
def probe_queries_of(module: Any, hidden: Tensor, positions: Tensor, rope: Rope | None, rows: Tensor) -> ProbeQueries:
    """Queries of some of the new tokens, as the module's attention uses them; the others are not projected."""
    found = queries(module, hidden[:, rows])
    if rope is not None:
        found = rope.apply(found, positions[:, rows].expand(len(found), -1))
    scale = getattr(module, "scaling", module.head_dim**-0.5)
    return ProbeQueries(rows, found * scale, getattr(module, "attn_logit_softcapping", None))


@dataclass(frozen=True)
class CheckInput:
    """Pre-hook of the decoder of the attachment `name`: what would silently give wrong tokens is refused."""

    name: str

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        given = by_name(module, args, kwargs)
        cache = given.get("past_key_values")
        if isinstance(cache, KVCache):
            _check_input(self.name, cache, module, given)


@at_once
@own_modes
def _check_input(name: str, cache: KVCache, module: Any, arguments: Mapping[str, Any]) -> None:
    given = arguments.get("input_ids")
    given = arguments.get("inputs_embeds") if given is None else given
    if given is None:
        return
    cache.check_whole()
    b, s = given.shape[:2]
    seen = cache.get_seq_length()
    if b == 0 or s == 0:
        raise CacheError(
            f"the input is empty ({b} x {s} tokens) while the cache holds {seen}. Pass at least one new token."
        )
    if (rows := cache.rows or b) != b:
        raise CacheError(
            f"the cache holds {rows} sequences, the input has {b}. Call batch_repeat_interleave or make another cache."
        )
    check_owner(module, name, cache, s)
    check_columns(cache, module, arguments.get("attention_mask"), arguments.get("position_ids"), b, s)
