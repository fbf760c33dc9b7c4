"""attach: hooks that hand our cache what transformers does not pass to it. Per model, idempotent, undone by detach."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from kvshrink.attach.attention import NAME, PREVIOUS, register
from kvshrink.attach.check import check_attention, check_keys
from kvshrink.attach.families import LayerInfo, key_value_weights, layer_kinds, layers_of, queries, text_config
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import Asked
from kvshrink.errors import CacheError, UnsupportedModelError

ATTRIBUTE = "_kvshrink"  # where a model keeps its attachment


@dataclass
class Attachment:
    """Per-model state."""

    layers: list[LayerInfo]
    kinds: list[str]
    fingerprint: str
    previous: str
    hooks: list[RemovableHandle] = field(default_factory=list)


def attach(model: Any) -> Attachment:
    """Let the model read and write kvshrink caches. Other caches and training are not touched.

    Raises UnsupportedModelError, before anything is changed, if the model's keys cannot be understood.
    """
    known = getattr(model, ATTRIBUTE, None)
    if known is not None:
        return known
    previous = model.config._attn_implementation or "sdpa"
    if previous == "flex_attention" or "|" in previous:
        raise UnsupportedModelError(
            f"attention implementation {previous!r} is not supported. Load the model with 'sdpa'."
        )
    layers, kinds = layers_of(model), layer_kinds(text_config(model))
    # one layer with RoPE and one without, as far as there are any
    kept = [i for i, x in enumerate(layers) if x.compressed]
    probes = {layers[i].rope is not None: i for i in reversed(kept)}.values()
    for i in probes:
        check_keys(model, layers[i], kinds[i])
    attachment = Attachment(layers, kinds, fingerprint(model, layers), previous)
    register()
    for info in layers:
        setattr(info.module, PREVIOUS, previous)
        hook = _Stage(info, attachment.fingerprint)
        attachment.hooks.append(info.module.register_forward_pre_hook(hook, with_kwargs=True))
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    attachment.hooks.append(decoder.register_forward_pre_hook(_check_input, with_kwargs=True))
    setattr(model, ATTRIBUTE, attachment)
    try:
        model.set_attn_implementation(NAME)
        for i in probes:
            check_attention(model, layers[i], kinds[i], attachment.fingerprint)
    except BaseException:
        detach(model)
        raise
    return attachment


def detach(model: Any) -> None:
    """Undo `attach`. Caches made for the model can no longer be used with it."""
    attachment = getattr(model, ATTRIBUTE, None)
    if attachment is None:
        return
    for hook in attachment.hooks:
        hook.remove()
    for info in attachment.layers:
        delattr(info.module, PREVIOUS)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(attachment.previous)
    delattr(model, ATTRIBUTE)


@contextmanager
def attached(model: Any) -> Iterator[Any]:
    """The model attached for the length of a `with` block."""
    was = hasattr(model, ATTRIBUTE)
    attach(model)
    try:
        yield model
    finally:
        if not was:
            detach(model)


class Fingerprint:
    """Hash of a model's shape and of its first and last layer's key weights, the same in any float dtype."""

    def __init__(self, config: PreTrainedConfig) -> None:
        names = (
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        self.hash = hashlib.sha256(json.dumps([getattr(config, n, None) for n in names]).encode())

    def add(self, module: Any) -> None:
        """The first layer's attention module, then the last one's."""
        weight = key_value_weights(module)[0].detach()
        # signs alone: they survive a change between float32, bfloat16 and float16, and hardly any two models share them
        bits = torch.signbit(weight) if weight.is_floating_point() else weight
        self.hash.update(bits.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def value(self) -> str:
        return self.hash.hexdigest()[:16]


def fingerprint(model: Any, layers: list[LayerInfo]) -> str:
    """Fingerprint of a loaded model."""
    result = Fingerprint(text_config(model))
    for index in sorted({0, len(layers) - 1}):
        result.add(layers[index].module)
    return result.value()


class _Stage:
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


def _check_input(module: Any, args: tuple, kwargs: dict) -> None:
    """Pre-hook of the decoder: what would silently give wrong tokens is refused."""
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
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != (b, seen + s):
        raise CacheError(
            f"attention_mask has shape {tuple(mask.shape)}, but the cache holds {seen} tokens and the input {s}: "
            f"it must be ({b}, {seen + s}), one column for every token so far."
        )
