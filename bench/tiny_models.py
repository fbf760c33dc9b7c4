"""A tiny random model of any type that transformers knows, text or image-text, whose attention is sharp enough that
an error in it shows in the tokens."""

import inspect
from typing import Any

import torch
import transformers
from tiny_settings import BY_TYPE, COMMON, OPEN, SIZES, VOCABULARY
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TYPES = {"text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
LARGEST = 60e6  # parameters, above which a type is not tiny
OTHERS = ("vision", "audio", "image", "vq", "vae", "mask")  # in the name of a part that is no text model
STATES = ("a_log", "dt_bias", "d", "dt")  # weights of recurrences, which stay as they are made
SHARP = ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn", "wq", "wk")


def names(kind: str) -> list[str]:
    return list(TYPES[kind])


def build(kind: str, name: str) -> Any:
    """A model in float32, in eval mode, without an end token. Raises whatever transformers does for a type that cannot
    be built from its config, ValueError if it is not tiny."""
    found = TYPES[kind][name]
    architecture = getattr(transformers, found if isinstance(found, str) else found[0])
    config = config_of(name)
    config.dtype = torch.float32
    torch.manual_seed(0)
    model = architecture._from_config(config)
    if (count := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise ValueError(f"{count / 1e6:.0f}M parameters")
    randomise(model)
    own = model.generation_config
    for setting in vars(own):
        if setting in ("suppress_tokens", "forced_eos_token_id", "begin_suppress_tokens", "cache_implementation"):
            setattr(own, setting, None)
    own.eos_token_id, own.pad_token_id, own.bos_token_id = None, 0, 1
    own.max_length = own.max_new_tokens = own.temperature = own.top_p = own.top_k = None
    own.repetition_penalty = own.num_beams = None
    own.do_sample = False
    return model.eval().float().requires_grad_(False)


def config_of(name: str, **more: Any) -> Any:
    """more: settings besides, or instead."""
    cls = CONFIG_MAPPING[name]
    given, base, parts = {**BY_TYPE.get(name, {}), **more}, _default(cls), {}
    for key in getattr(cls, "sub_configs", None) or {}:
        part = getattr(base, key, None)
        if part is not None:
            parts[key] = _part(key, part, given.pop(key, {}))
    if not parts:
        return cls(**sizes(cls, given))
    top: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
    fields = [k for k in vars(base) if k.endswith(("_token_id", "_token_index")) and k not in top]
    top |= {k: 120 + n % 8 for n, k in enumerate(fields) if getattr(base, k) is not None}
    if "vocab_size" in getattr(cls, "__annotations__", {}):
        top["vocab_size"] = VOCABULARY
    return cls(**parts, **top, **given)


def _part(key: str, config: Any, given: dict[str, Any]) -> dict[str, Any]:
    text = not any(word in key for word in OTHERS)
    small = sizes(type(config), {**(BY_TYPE.get(config.model_type, {}) if text else {}), **given})
    if not text:
        small = {k: v for k, v in small.items() if k in given or k not in COMMON or k == "max_position_embeddings"}
    return {**small, "model_type": config.model_type}


def _default(cls: Any) -> Any:
    try:
        return cls()
    except Exception:
        return None


def _get(config: Any, name: str, default: Any = None) -> Any:
    try:
        return getattr(config, name, default)
    except Exception:  # a setting that differs between layers
        return True


def sizes(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a config of this class."""
    base, known = _default(cls), set(inspect.signature(cls.__init__).parameters)
    for parent in cls.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    alias = getattr(cls, "attribute_map", None) or {}
    out: dict[str, Any] = {}
    for name, value in {**SIZES, **COMMON}.items():
        own = alias.get(name, name)
        if name not in known and own not in known and name not in COMMON:
            continue
        empty = base is not None and _get(base, own, _get(base, name)) is None
        if (empty and name not in OPEN) or (empty and name == "head_dim" and name not in known):
            continue
        out[own] = value
    if "kv_lora_rank" in known and "num_key_value_heads" in out:
        out["num_key_value_heads"] = 4
    kinds = _get(base, "layer_types")
    if (
        isinstance(kinds, list | tuple)
        and "layer_types" in known
        and not {"layer_types", "num_hidden_layers"} & set(given)
    ):
        out |= _one_of_each(list(dict.fromkeys(kinds)))
    mlps = _get(base, "mlp_layer_types")
    if isinstance(mlps, list | tuple) and "mlp_layer_types" in known:
        out["mlp_layer_types"] = [*mlps[:1], *list(mlps[-1:]) * 8][: out.get("num_hidden_layers", 2)]
    out |= given
    if "layer_types" in out and "num_hidden_layers" in known:
        out["num_hidden_layers"] = len(out["layer_types"])
    return out


def _one_of_each(kinds: list[str]) -> dict[str, Any]:
    if len(kinds) == 1 and kinds != ["sliding_attention"]:
        return {}
    ordered = [k for k in kinds if k != "full_attention"] + ["full_attention"] * ("full_attention" in kinds)
    layers = (ordered * 2)[:4] if len(ordered) <= 2 else ordered
    return {"layer_types": layers, "num_hidden_layers": len(layers)}


def randomise(model: Any) -> None:
    """Weights of seed 3, biases, norms and sinks too; recurrences keep what they were made with."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(_drawn(name.lower(), weight.data, noise).to(weight.dtype))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data.nan_to_num_(0.0, 0.0, 0.0)


def _drawn(name: str, weight: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    last = name.split(".")[-1]
    if last in STATES or "a_log" in last or "dt_bias" in last or "time_" in last:
        return weight.nan_to_num(0.0, 0.0, 0.0)
    if "norm" in name and weight.dim() == 1 and last != "bias":
        return weight.nan_to_num(1.0, 1.0, 1.0).clamp(-1, 1) + 0.2 * noise
    if weight.dim() == 1:
        return 0.3 * noise
    if "embed" in name or "wte" in name:
        return 0.5 * noise if "embed_out" not in name else noise
    if "lm_head" in name:
        return noise
    fan = weight.shape[-1] if weight.dim() <= 3 else weight[0].numel()
    if "experts" in name and weight.dim() == 3:
        fan = max(weight.shape[-1], weight.shape[-2])
    return (1.4 if any(part in name for part in SHARP) else 1.0) * noise / fan**0.5
