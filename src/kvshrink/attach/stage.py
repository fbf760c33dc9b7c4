"""Pre-hooks: what a step hands to a cache that transformers does not pass, and input that is refused before it runs."""

from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.attention import NAME
from kvshrink.attach.families import LayerInfo, queries
from kvshrink.attach.owner import check_owner
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import Asked
from kvshrink.errors import CacheError


class Stage:
    """Pre-hook of one attention module: stages positions and pads on the cache layer that `update` will reach."""

    def __init__(self, info: LayerInfo, model: str) -> None:
        self.index, self.rope, self.model = info.module.layer_idx, info.rope, model
        self.compressed = info.compressed

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        if not self.compressed or not isinstance(cache, KVCache):
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        b, s = hidden.shape[:2]
        seen = cache.layers[self.index].get_seq_length()
        positions = kwargs.get("position_ids")
        if positions is None:
            raise CacheError(f"{type(module).__name__} got no position_ids. Call the model, not the layer.")
        own = module.config._attn_implementation == NAME
        # the token table is one for all layers; only the step's first compressed layer extends it
        real = _real(kwargs.get("attention_mask"), b, s, seen) if cache.table.length == seen else None
        rope = self.rope
        if rope is not None and rope.inv_freq.device != hidden.device:  # the model was moved after attach
            rope = self.rope = type(rope)(rope.inv_freq.to(hidden.device), rope.scaling, rope.interleaved)
        positions, layer = positions.to(torch.int32), cache.layers[self.index]
        asked = None
        if isinstance(layer, CompressedLayer) and (rows := layer.probes(s)) is not None:
            asked = asked_of(module, hidden, positions, rope, rows.to(hidden.device))
        cache.stage(self.index, positions, real, rope, own, self.model, asked)


@torch.no_grad()
def asked_of(module: Any, hidden: Tensor, positions: Tensor, rope: Rope | None, rows: Tensor) -> Asked:
    """Queries of some of the new tokens, as the module's attention uses them; the others are not projected."""
    found = queries(module, hidden[:, rows])
    if rope is not None:
        found = rope.turn(found, positions[:, rows].expand(len(found), -1))
    scale = getattr(module, "scaling", module.head_dim**-0.5)
    return Asked(rows, found * scale, getattr(module, "attn_logit_softcapping", None))


def _real(mask: Tensor | None, b: int, s: int, seen: int) -> Tensor | None:
    """Which of the s new columns are tokens: those the last new token sees. None if all are."""
    if mask is None or mask.dim() not in (2, 4):
        return None
    row = mask if mask.dim() == 2 else mask[:, 0, -1]
    if row.shape[-1] != seen + s:
        raise CacheError(
            f"the attention mask covers {row.shape[-1]} columns, the cache {seen} and the input {s}. "
            f"Make it {seen + s}."
        )
    new = row[:, -s:].expand(b, s)
    new = (
        new if new.dtype == torch.bool else new > torch.finfo(new.dtype).min / 2 if new.is_floating_point() else new > 0
    )
    return None if bool(new.all()) else new


def check_input(name: str, module: Any, args: tuple, kwargs: dict) -> None:
    """Pre-hook of the decoder of the attachment `name`: what would silently give wrong tokens is refused."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, KVCache):
        return
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    given = args[0] if given is None and args else given
    if given is None:
        return
    cache.check_whole()
    b, s = given.shape[:2]
    seen = cache.get_seq_length()
    if b == 0 or s == 0:
        raise CacheError(
            f"the input is empty ({b} x {s} tokens) while the cache holds {seen}. Pass at least one new token."
        )
    rows = cache.table.positions.shape[0] if cache.table.length else b
    if rows != b:
        raise CacheError(
            f"the cache holds {rows} sequences, the input has {b}. Call batch_repeat_interleave or make another cache."
        )
    check_owner(module, name, cache, s)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != (b, seen + s):
        raise CacheError(
            f"attention_mask has shape {tuple(mask.shape)}, but the cache holds {seen} tokens and the input {s}: "
            f"it must be ({b}, {seen + s}), one column for every token so far."
        )
