"""attach: hooks that hand our cache what transformers does not pass to it. Per model, idempotent, undone by detach."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from torch.utils.hooks import RemovableHandle

from kvshrink.attach.attention import NAME, PREVIOUS, register
from kvshrink.attach.check import check_attention, check_keys
from kvshrink.attach.families import LayerInfo, layer_kinds, layers_of, text_config
from kvshrink.attach.identity import decoder_of
from kvshrink.attach.stage import Stage, check_input
from kvshrink.errors import UnsupportedModelError

ATTRIBUTE = "_kvshrink"  # where a model keeps its attachment


@dataclass
class Attachment:
    """Per-model state."""

    layers: list[LayerInfo]
    kinds: list[str]
    previous: str
    name: str = field(default_factory=lambda: uuid4().hex)  # by which a cache knows whom it may serve
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
    attachment = Attachment(layers, kinds, previous)
    register()
    for info in layers:
        setattr(info.module, PREVIOUS, previous)
        hook = Stage(info, attachment.name)
        attachment.hooks.append(info.module.register_forward_pre_hook(hook, with_kwargs=True))
    decoder = decoder_of(model)
    attachment.hooks.append(decoder.register_forward_pre_hook(partial(check_input, attachment.name), with_kwargs=True))
    setattr(model, ATTRIBUTE, attachment)
    try:
        model.set_attn_implementation(NAME)
        for i in probes:
            check_attention(model, layers[i], kinds[i], attachment.name)
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
