"""attach: hooks that hand our cache what transformers does not pass to it. Per model, idempotent, undone by detach.

The attachment is kept by the decoder, which a model shares with everything that wraps it. One lock serves all models:
attaching is rare, and models may share a config.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvshrink.attach.attention import register
from kvshrink.attach.check import check_layers
from kvshrink.attach.families import (
    LayerInfo,
    attention_modules,
    layer_kinds,
    text_config,
    text_tower,
    understood,
)
from kvshrink.attach.images import holders, mark_images
from kvshrink.attach.implementation import NAME, PREVIOUS, Ours, choose, distinct, named
from kvshrink.attach.inputs import check_use
from kvshrink.attach.look import layers_of, takes_axes
from kvshrink.attach.stage import CheckInput, Stage, end_step
from kvshrink.attach.target import check_loaded, transformers_model, unpack
from kvshrink.errors import UnsupportedModelError
from kvshrink.store.modes import outside_modes

ATTRIBUTE = "_kvshrink"  # where a decoder keeps its attachment
LOCK = threading.RLock()
LIVE: "weakref.WeakSet[Attachment]" = weakref.WeakSet()


@dataclass(eq=False)
class Attachment:
    """What was changed in one model, and what is known of it."""

    layers: list[LayerInfo]
    configs: list[tuple[PreTrainedConfig, str | None]]  # with the implementation that each named before
    axes: bool = False  # whether the decoder takes positions of several axes
    holders: list[Any] = field(default_factory=list)  # modules that see ids of images before the decoder
    name: str = field(default_factory=lambda: uuid4().hex)  # by which a cache knows whom it may serve
    blocks: int = 0  # `with attached(model)` blocks that are open, if the first of them attached it

    def __post_init__(self) -> None:
        register()
        LIVE.add(self)

    @property
    def modules(self) -> list[Any]:
        """The attention modules."""
        return [info.module for info in self.layers if info.module is not None]

    def __reduce__(self) -> tuple:
        """A copied or unpickled model's attachment is one of its own."""
        return Attachment, (self.layers, self.configs, self.axes, self.holders, self.name)


def attach(model: Any) -> Attachment:
    """Let the model read and write kvshrink caches. Other caches and training are not touched.

    model: a transformers model, or a pipeline or wrapper of one (PEFT, torch.compile): all share one attachment.
    Raises UnsupportedModelError, before anything is changed, if the model's keys cannot be understood.
    """
    return _attach(transformers_model(model))[0]


def _attach(model: PreTrainedModel) -> tuple[Attachment, bool]:
    """The attachment, and whether it is new."""
    with LOCK, understood(model):
        tower = text_tower(model)
        known: Attachment | None = vars(tower).get(ATTRIBUTE)
        if known is not None:
            if attention_modules(model, layer_kinds(model)) == [info.module for info in known.layers]:
                _see_images(model, tower, known)
                return known, False
            _undo(tower, known)  # its layers were replaced
        check_loaded(model)
        with outside_modes(), torch.inference_mode(False):
            unpack(model)
            attachment = _inspected(model, tower)
        try:
            _apply(tower, attachment)
            _see_images(model, tower, attachment)
        except BaseException:
            _undo(tower, attachment)
            raise
        return attachment, True


def _inspected(model: PreTrainedModel, tower: Any) -> Attachment:
    """An attachment that has changed nothing yet. Raises UnsupportedModelError."""
    layers = layers_of(model)
    own = [info.module.config for info in layers if info.module is not None]
    configs = distinct([model.config, text_config(model), tower.config, *own])
    default = "sdpa" if model._supports_sdpa else "eager"
    before = [(config, named(config, default)) for config in configs]
    for name in {name for _, name in before if name is not None}:
        # flash looks for the kernel that the config names, which is ours by then
        if "flex" in name or "flash" in name or "|" in name:
            raise UnsupportedModelError(
                f"attention implementation {name!r} is not supported. Load the model with 'sdpa'."
            )
    register()
    check_layers(model, layers)
    return Attachment(layers, before, takes_axes(model, layers))


def _apply(tower: nn.Module, attachment: Attachment) -> None:
    _strip(tower)  # a layer may be the copy of an attached one
    before = {id(config): name for config, name in attachment.configs}
    for module in (tower, *attachment.modules):
        setattr(module, PREVIOUS, before[id(module.config)])
    for info in (x for x in attachment.layers if x.compressed):
        info.module.register_forward_pre_hook(Stage(info, attachment.name), with_kwargs=True)
    for check in (check_use, CheckInput(attachment.name, attachment.axes)):
        tower.register_forward_pre_hook(check, with_kwargs=True)
    tower.register_forward_hook(end_step, with_kwargs=True)
    setattr(tower, ATTRIBUTE, attachment)
    for config, name in attachment.configs:
        choose(config, Ours(name))


def _see_images(model: nn.Module, tower: nn.Module, attachment: Attachment) -> None:
    """Hooks before the modules around the decoder that see ids of images, which may be more than there were."""
    for module in holders(model, tower):
        if not any(module is known for known in attachment.holders):
            _strip_one(module)
            module.register_forward_pre_hook(mark_images, with_kwargs=True)
            attachment.holders.append(module)


def detach(model: Any) -> None:
    """Undo `attach`, through any object that it accepts. Caches of the model can no longer be used with it."""
    model = transformers_model(model)
    with LOCK:
        tower = text_tower(model)
        attachment = vars(tower).get(ATTRIBUTE)
        if attachment is not None:
            _undo(tower, attachment)


def _undo(tower: nn.Module, attachment: Attachment) -> None:
    LIVE.discard(attachment)
    for part in (tower, *attachment.modules):
        _strip(part)
    for part in attachment.holders:
        _strip_one(part)
    shared = {id(config) for other in LIVE for config, _ in other.configs}
    for config, name in attachment.configs:
        if config._attn_implementation == NAME and id(config) not in shared:
            choose(config, name)


def _strip(tower: nn.Module) -> None:
    """Take away all that is ours from a module and those inside it."""
    for module in tower.modules():
        _strip_one(module)


def _strip_one(module: nn.Module) -> None:
    vars(module).pop(ATTRIBUTE, None)
    vars(module).pop(PREVIOUS, None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Stage | CheckInput) or hook in (check_use, mark_images):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [k for k, hook in module._forward_hooks.items() if hook is end_step]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


@contextmanager
def attached(model: Any) -> Iterator[Any]:
    """The model attached for the length of a `with` block; blocks of several threads end with the last of them."""
    inner = transformers_model(model)
    with LOCK:
        attachment, new = _attach(inner)
        counted = new or attachment.blocks > 0
        attachment.blocks += counted
    try:
        yield model
    finally:
        with LOCK:
            attachment.blocks -= counted
            tower = text_tower(inner)
            if counted and attachment.blocks == 0 and vars(tower).get(ATTRIBUTE) is attachment:
                _undo(tower, attachment)
