"""Where a model family keeps what we need: projections, norms, RoPE. Found by looking, then checked (check.py).

Modules of one kind differ in four ways only: fused or separate projections, clipping (Olmo), a key norm over the whole
width (Olmo2) or per head (Qwen3, Gemma3, Cohere), and the pairing of RoPE channels.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvshrink.cache.rope import Rope
from kvshrink.errors import KVShrinkError, UnsupportedModelError
from kvshrink.methods._stats import LayerShape
from kvshrink.shapes import Float

INTERLEAVED = {"glm", "glm4", "cohere", "cohere2"}  # families that pair channels 2i and 2i + 1
MOVING = {"dynamic", "longrope"}  # RoPE whose frequencies depend on the length reached
KINDS = {"full_attention", "sliding_attention"}
SWAMPS = 30  # a key bias to what varies, from which on 8 bits of a token would be for the bias
ENCODER = {"encoder_hidden_states", "cross_attention_states", "key_value_states"}  # what cross-attention reads


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer: its module, whether it is compressed (full attention), and its RoPE (None: no positions)."""

    module: Any
    compressed: bool
    rope: Rope | None


def text_config(model: Any) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def text_tower(model: Any) -> Any:
    """The decoder of a model: where its attention layers and its RoPE are, and no vision tower's."""
    tower = model.get_decoder() if hasattr(model, "get_decoder") else model
    return getattr(tower, "language_model", None) or tower


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


def attention_modules(model: Any) -> list[Any]:
    """The self-attention modules in layer order. Raises UnsupportedModelError if they are not one per layer."""
    takes = [(m, inspect.signature(m.forward).parameters) for m in text_tower(model).modules() if _caches(m)]
    found = [m for m, names in takes if "past_key_values" in names]
    config = text_config(model)
    if hasattr(config, "kv_lora_rank"):
        raise UnsupportedModelError(
            f"{config.model_type} caches MLA latents, which are shrunken already. Use a GQA or MHA model."
        )
    if any(ENCODER & set(names) for _, names in takes):
        raise UnsupportedModelError(
            f"{config.model_type} has cross-attention, whose cache is not one of tokens. Use a decoder-only model."
        )
    layers = config.num_hidden_layers
    if sorted(str(m.layer_idx) for m in found) != sorted(map(str, range(layers))):
        raise UnsupportedModelError(
            f"{config.model_type}: {len(found)} attention modules for {layers} layers. Linear attention, "
            "shared caches and encoder-decoder models are not supported."
        )
    for m in found:
        if not hasattr(m, "qkv_proj") and None in (getattr(m, "k_proj", None), getattr(m, "v_proj", None)):
            raise UnsupportedModelError(
                f"{config.model_type}: layer {m.layer_idx} has no projection of its own for keys or values. "
                "Layers whose values are their keys, or another layer's, are not supported."
            )
    return sorted(found, key=lambda m: m.layer_idx)


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """'full_attention' or 'sliding_attention' per layer. Raises UnsupportedModelError on anything else."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
        kinds = [kind] * config.num_hidden_layers
    if other := sorted(set(kinds) - KINDS):
        raise UnsupportedModelError(
            f"{config.model_type} has layers of kind {other}. Only full and sliding attention are supported."
        )
    return list(kinds)


def layers_of(model: Any) -> list[LayerInfo]:
    """What we need to know of every layer. Raises UnsupportedModelError, before anything runs."""
    with understood(model):
        config = text_config(model)
        modules, kinds = attention_modules(model), layer_kinds(config)
        rotary = rotary_module(model)
        return [
            LayerInfo(m, k == "full_attention", _rope(m, k, config, rotary))
            for m, k in zip(modules, kinds, strict=True)
        ]


def rotary_module(model: Any) -> Any:
    """The module that makes cos and sin, shared by all layers."""
    return next((m for m in text_tower(model).modules() if hasattr(m, "rope_type") and hasattr(m, "config")), None)


def key_value(module: Any, hidden: Float[Tensor, "b s hidden"]) -> tuple[Tensor, Tensor]:
    """Keys before RoPE (bias, clipping and norm applied) and values, [b, h, s, d], as the module makes them."""
    d, config = module.head_dim, module.config
    if hasattr(module, "qkv_proj"):
        n_q, n_kv = config.num_attention_heads * d, config.num_key_value_heads * d
        keys, values = module.qkv_proj(hidden)[..., n_q:].split(n_kv, -1)
    else:
        keys, values = module.k_proj(hidden), module.v_proj(hidden)
    return _heads(module, keys, "k_norm"), _heads(module, values, None)


def queries(module: Any, hidden: Float[Tensor, "b s hidden"]) -> Float[Tensor, "b q s d"]:
    """Queries before RoPE, as the module makes them."""
    if hasattr(module, "qkv_proj"):
        rows = module.qkv_proj(hidden)[..., : module.config.num_attention_heads * module.head_dim]
    else:
        rows = module.q_proj(hidden)
    return _heads(module, rows, "q_norm")


def _heads(module: Any, rows: Tensor, norm_name: str | None) -> Tensor:
    """A projection's rows clipped, normed and split into heads, [b, heads, s, d]."""
    d = module.head_dim
    if (clip := getattr(module.config, "clip_qkv", None)) is not None:
        rows = rows.clamp(-clip, clip)
    norm = getattr(module, norm_name, None) if norm_name else None
    weight = getattr(norm, "weight", None)
    over_width = weight is not None and weight.dim() == 1 and weight.numel() != d
    if over_width:
        rows = norm(rows)
    rows = rows.unflatten(-1, (-1, d))
    if norm is not None and not over_width:
        rows = norm(rows)
    return rows.transpose(1, 2)


def key_value_parts(module: Any) -> tuple[tuple[Tensor, slice], tuple[Tensor, slice]]:
    """(weight, rows of it that make keys), and the same of values."""
    if hasattr(module, "qkv_proj"):
        weight, n_kv = module.qkv_proj.weight, module.config.num_key_value_heads * module.head_dim
        total = weight.shape[0]
        return (weight, slice(total - 2 * n_kv, total - n_kv)), (weight, slice(total - n_kv, total))
    return (module.k_proj.weight, slice(None)), (module.v_proj.weight, slice(None))


def key_value_weights(module: Any) -> tuple[Tensor, Tensor]:
    """Weights [n, hidden] of the key and value projections."""
    (key, key_rows), (value, value_rows) = key_value_parts(module)
    return key[key_rows], value[value_rows]


def key_value_biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Biases [n] of the key and value projections; None: they have none."""
    (_, key_rows), (_, value_rows) = key_value_parts(module)
    joint = getattr(module, "qkv_proj", None)
    key, value = ((joint or getattr(module, name)).bias for name in ("k_proj", "v_proj"))
    return (None if key is None else key[key_rows].detach()), (None if value is None else value[value_rows].detach())


def output_weight(module: Any) -> Float[Tensor, "hidden q d"]:
    """Weight of the output projection by query head."""
    return module.o_proj.weight.unflatten(-1, (-1, module.head_dim))


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype of the module's keys and values. Weights stored as integers (bitsandbytes) do not tell it."""
    dtype = key_value_weights(module)[0].dtype
    if dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    return getattr(module.config, "dtype", None) or torch.get_default_dtype()


def shape_of(module: Any) -> LayerShape:
    """Shape of an attention module's cache."""
    return LayerShape(kv_heads(module), module.head_dim, compute_dtype(module), _swamped(module))


def key_constant(module: Any) -> tuple[Float[Tensor, "h d"], Float[Tensor, "h d"]] | None:
    """(bias of the key projection, what varies beside it); None: there is no bias, or nothing to tell by."""
    bias, weight = key_value_biases(module)[0], key_value_weights(module)[0]
    if bias is None or bias.is_meta or not weight.is_floating_point():
        return None
    # of inputs with a variance of one, as norms leave them
    spread = weight.detach().float().norm(dim=1).view(-1, module.head_dim)
    return bias.detach().float().view_as(spread), spread


def _swamped(module: Any) -> bool:
    """By some rows of the weight, since it is asked for every cache; of weights stored as codes nothing is known."""
    bias, weight = key_value_biases(module)[0], key_value_weights(module)[0]
    if bias is None or bias.is_meta:
        return False
    known = weight.is_floating_point() and weight.dtype.itemsize > 1
    spread = float(weight.detach()[:: max(1, len(weight) // 64)].float().norm(dim=1).mean()) if known else 1.0
    return float(bias.detach().abs().max()) >= SWAMPS * spread


def kv_heads(module: Any) -> int:
    return key_value_weights(module)[0].shape[0] // module.head_dim


def position_embeddings(model: Any, positions: Tensor, like: Tensor, kind: str) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) as the model makes them for a layer of this kind."""
    rotary = rotary_module(model)
    if rotary is None or not _turns(rotary, kind):
        return None
    per_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    return rotary(like, positions, kind) if per_kind else rotary(like, positions)


def _rope(module: Any, kind: str, config: PreTrainedConfig, rotary: Any) -> Rope | None:
    if rotary is None or not _turns(rotary, kind) or not getattr(module, "use_rope", True):
        return None
    rope_type = rotary.rope_type[kind] if isinstance(rotary.rope_type, dict) else rotary.rope_type
    if rope_type in MOVING:
        raise UnsupportedModelError(
            f"{config.model_type} uses {rope_type} RoPE, whose frequencies move with the length. "
            "Only fixed ones (default, linear, llama3, yarn) can be undone."
        )
    prefix = f"{kind}_" if isinstance(rotary.rope_type, dict) else ""
    frequencies = getattr(rotary, f"{prefix}inv_freq").detach().float().clone()
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    return Rope(frequencies, scaling, config.model_type in INTERLEAVED)


def _turns(rotary: Any, kind: str) -> bool:
    """Whether layers of this kind have a RoPE: where each kind has its own, some have none."""
    return not isinstance(rotary.rope_type, dict) or kind in rotary.rope_type


def _caches(module: Any) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "o_proj")
