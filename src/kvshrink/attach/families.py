"""Which modules of a model have a cache of tokens, of what kind each layer is, and what is known of those we shrink.

Nothing is listed by family: modules are found by what they take, layer kinds are those of transformers' DynamicCache,
and the rest is seen by running a module (asking.py), then checked (check.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from kvshrink.attach.asking import CACHES, names_of
from kvshrink.attach.projections import swamped
from kvshrink.cache.rope import Rope
from kvshrink.errors import KVShrinkError, UnsupportedModelError
from kvshrink.methods._stats import LayerShape

KEPT = {"full_attention", "hybrid"}  # kinds of layers whose keys and values are shrunken
# those that stay as transformers makes them. Of kinds that choose what they attend to, modules build the mask of that
# only where their attention is called "eager" or "sdpa": under our name they would attend to all
PASSED = {"sliding_attention", "chunked_attention", "conv", "linear_attention", "hybrid_sliding", "dummy", "moe", "mlp"}


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a cache.

    module:     its attention; None: it has none that caches tokens (a recurrence, an MLP alone).
    kind:       as transformers names it.
    compressed: whether its keys and values are shrunken.
    heads, key_dim, value_dim: of what reaches the cache.
    rope:       of its keys. None: no positions, or `moves`.
    moves:      whether keys are turned in a way that cannot be undone (frequencies that change with the length, a norm
                behind the rotation): only methods that store keys as attention uses them.
    latent:     whether keys and values are made of what is cached (MLA), so that all of it is given back at each step.
    """

    module: Any
    kind: str
    compressed: bool
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    rope: Rope | None = None
    moves: bool = False
    latent: bool = False


def text_config(model: Any) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def text_tower(model: Any) -> Any:
    """The decoder of a model: where its attention layers and its RoPE are, and no vision tower's."""
    tower = model.get_decoder() if hasattr(model, "get_decoder") else model
    tower = getattr(tower, "language_model", None) or tower
    # some call their head a decoder, some the whole model
    whole = tower is model or not any(hasattr(m, "layer_idx") for m in tower.modules())
    return getattr(model, "base_model", model) if whole else tower


def layer_list(model: Any) -> tuple[Any, str]:
    """(module, name): where the decoder's layers are. Raises UnsupportedModelError if there is no list of them."""
    tower, count = text_tower(model), text_config(model).num_hidden_layers
    for module in tower.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise UnsupportedModelError(f"{text_config(model).model_type} has no list of {count} layers. It cannot be fitted.")


def decoder_layers(model: Any) -> Any:
    """The decoder's layers, in order."""
    holder, name = layer_list(model)
    return getattr(holder, name)


@contextmanager
def understood(model: Any) -> Iterator[None]:
    """Whatever goes wrong while a model is looked at means that it is of an unknown kind: UnsupportedModelError."""
    try:
        yield
    except (KVShrinkError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        name = getattr(model.config, "model_type", type(model).__name__)
        raise UnsupportedModelError(f"{name}: its attention layers are of an unknown kind ({reason}).") from error


def layer_kinds(model: Any) -> list[str]:
    """The kind of each layer of the model's cache. Raises UnsupportedModelError on one that chooses what it reads."""
    config = text_config(model)
    kinds = list(get_layer_types_and_kwargs(config)[0])
    if other := sorted(set(kinds) - KEPT - PASSED):
        raise UnsupportedModelError(
            f"{config.model_type} has layers of kind {other}, which choose what they attend to. They are not supported."
        )
    return kinds


def attention_modules(model: Any, kinds: list[str]) -> list[Any]:
    """The self-attention module of each layer; None where it has none. Raises UnsupportedModelError."""
    name = text_config(model).model_type
    takes = [(m, _parameters(m)) for m in text_tower(model).modules() if isinstance(getattr(m, "layer_idx", None), int)]
    crosses = model.config.is_encoder_decoder or getattr(text_config(model), "add_cross_attention", False)
    if crosses or any("cross_attention_states" in names for _, names in takes if _caches(names)):
        raise UnsupportedModelError(
            f"{name} has cross-attention, whose cache is not one of tokens. Use a decoder-only model."
        )
    found = [m for m, names in takes if _caches(names) and _decodes(m, names)]
    # a layer that hands its cache on to what is inside it is no attention
    found = [m for m in found if not any(x is not m and any(x is y for y in found) for x in m.modules())]
    by_layer: dict[int, list[Any]] = {}
    for m in found:
        by_layer.setdefault(m.layer_idx, []).append(m)
    for i, kind in enumerate(kinds):
        count = len(by_layer.get(i, ()))
        if count > 1 and any("key_value_states" in _parameters(m) for m in by_layer[i]):
            raise UnsupportedModelError(f"{name} has cross-attention beside its own. Use a decoder-only model.")
        if count > 1 or (kind in KEPT and count == 0):
            raise UnsupportedModelError(
                f"{name}: layer {i} has {count} attention modules that cache tokens. One is supported."
            )
    told = getattr(text_config(model), "is_decoder", True)
    if told is False and any(getattr(m, "is_causal", True) is False for m in found):
        raise UnsupportedModelError(f"{name} is an encoder: its tokens see those after them. Use a decoder.")
    return [by_layer.get(i, [None])[0] for i in range(len(kinds))]


def _parameters(module: Any) -> frozenset[str]:
    return names_of(module.__class__)


def _caches(names: frozenset[str]) -> bool:
    return "hidden_states" in names and not set(CACHES).isdisjoint(names)


def _decodes(module: Any, names: frozenset[str]) -> bool:
    return "key_value_states" not in names or getattr(module, "is_decoder", False)


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype of the module's keys and values. Weights stored as integers (bitsandbytes) do not tell it."""
    dtype = first_weight(module).dtype
    if dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    return getattr(module.config, "dtype", None) or torch.get_default_dtype()


def first_weight(module: Any) -> Tensor:
    """A matrix of the module: where it is, and of which dtype. GPTQ and AWQ keep theirs as buffers."""
    return next(t for t in (*module.parameters(), *module.buffers()) if t.dim() > 1)


def shape_of(info: LayerInfo) -> LayerShape:
    """Shape of a layer's cache."""
    other = None if info.value_dim == info.key_dim else info.value_dim
    return LayerShape(info.heads, info.key_dim, compute_dtype(info.module), swamped(info.module), other)
