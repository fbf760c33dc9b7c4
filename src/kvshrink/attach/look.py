"""What is seen of a layer by running its attention on three tokens: widths, RoPE, and what it caches.

A key at position 0 is one before RoPE. Compared with the same tokens further on it shows whether there is a RoPE, and
how its channels are paired. Nothing of a model is changed.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvshrink.attach.asking import Asked, ask, hands_on, names_of
from kvshrink.attach.families import (
    KEPT,
    LayerInfo,
    attention_modules,
    compute_dtype,
    first_weight,
    layer_kinds,
    text_config,
    text_tower,
    understood,
)
from kvshrink.cache.rope import Rope
from kvshrink.errors import KVShrinkError, UnsupportedModelError

MOVING = {"dynamic"}  # RoPE whose frequencies depend on the length reached
POSITIONS = (0, 5, 11)
WINDOWS = {"sliding_attention", "chunked_attention", "hybrid_sliding"}  # of which only the widths are needed


@torch.no_grad()
def layers_of(model: Any) -> list[LayerInfo]:
    """What we need to know of every layer. Raises UnsupportedModelError, before anything is changed."""
    with understood(model):
        kinds = layer_kinds(model)
        modules = attention_modules(model, kinds)
        infos = [LayerInfo(m, kind, m is not None and kind in KEPT) for m, kind in zip(modules, kinds, strict=True)]
        if not any(info.module is not None and info.kind != "dummy" for info in infos):
            raise UnsupportedModelError(f"{text_config(model).model_type} has no attention that caches tokens.")
        stand_ins: dict[tuple, Any] = {}  # of modules that are not in memory
        return [_seen(model, x, stand_ins) if x.compressed or x.kind in WINDOWS else x for x in infos]


@torch.no_grad()
def takes_axes(model: Any, infos: list[LayerInfo]) -> bool:
    """Whether positions may be of several axes (time, height, width), as image-text models turn keys by."""
    with contextlib.suppress(Exception):  # whatever a RoPE of one axis makes of three
        for info in (x for x in infos if x.heads):
            device = first_weight(info.module).device
            hidden = torch.zeros(1, 5, text_config(model).hidden_size, device=device, dtype=compute_dtype(info.module))
            places = torch.zeros(1, 5, dtype=torch.long, device=device)
            given = keywords(model, info.module, info.kind, hidden, places)
            turns = position_embeddings(model, places[None].expand(3, -1, -1), hidden, info.kind)
            if turns is not None and "position_embeddings" in given:
                given["position_embeddings"] = turns
                return ask(info.module, given, turned=True, queries=False).key.dim() == 4
    return False


def _seen(model: Any, info: LayerInfo, stand_ins: dict[tuple, Any]) -> LayerInfo:
    module = info.module
    if first_weight(module).is_meta:
        key = kind_of(info)
        if key not in stand_ins:
            stand_ins[key] = _drawn(module)
        module = stand_ins[key]
    weight = first_weight(module)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(POSITIONS), text_config(model).hidden_size, generator=draw, device="cpu")
    hidden = hidden.to(weight.device, compute_dtype(module))
    positions = torch.tensor([POSITIONS], device=weight.device)
    given = keywords(model, module, info.kind, hidden, positions)
    turned, plain = (_ask(model, module, given, turned=t, queries=False) for t in (True, False))
    shapes = plain.key.shape, plain.value.shape
    if any(len(s) != 4 for s in shapes) or shapes[0][:3] != shapes[1][:3] or shapes[0][2] != len(POSITIONS):
        raise UnsupportedModelError(
            f"{text_config(model).model_type}: layer {module.layer_idx} caches {tuple(shapes[0])} and "
            f"{tuple(shapes[1])} of {len(POSITIONS)} tokens, which are no keys and values."
        )
    info = replace(info, heads=shapes[0][1], key_dim=shapes[0][3], value_dim=shapes[1][3])
    if not info.compressed:
        return info
    latent = _ask(model, module, given).query is None
    if turned.key.equal(plain.key):  # to the bit: beside a large bias a rotation is small
        return replace(info, latent=latent)
    fit = [rope for rope in _candidates(model, info.kind) if 2 * len(rope.inv_freq) <= plain.key.shape[3]]
    errors = [_error(rope.apply(plain.key.float(), positions), turned.key) for rope in fit]
    if not errors or min(errors) > _tolerance(turned.key):
        return replace(info, latent=latent, moves=True)
    rope = fit[errors.index(min(errors))]
    if rope.long is not None:
        beyond = positions + rope.most
        far = _ask(model, module, keywords(model, module, info.kind, hidden, beyond), turned=True, queries=False).key
        if _error(rope.apply(plain.key.float(), rope.marked(beyond)), far) > _tolerance(far):
            return replace(info, latent=latent, moves=True)
    return replace(info, latent=latent, rope=rope)


def _ask(model: Any, module: Any, given: Mapping[str, Any], **how: Any) -> Asked:
    try:
        return ask(module, given, **how)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        what = reason if isinstance(error, KVShrinkError) else f"{type(error).__name__}: {reason}"
        raise UnsupportedModelError(
            f"{text_config(model).model_type}: the attention of layer {module.layer_idx} cannot run on its own "
            f"({what}). It is of an unknown kind."
        ) from error


def keywords(model: Any, module: Any, kind: str, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    """What a module is called with, by the names that it gives them, without mask and cache."""
    names = names_of(module.__class__)
    given = {
        "hidden_states": hidden,
        "position_embeddings": position_embeddings(model, positions, hidden, kind),
        "position_ids": positions,
        "attention_mask": None,
        "layer_idx": module.layer_idx,
        "shared_kv_states": {},
    }
    every = hands_on(module.__class__)
    return {k: v for k, v in given.items() if k in names or (every and k == "position_ids")}


def _error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest number; infinite where one is no number."""
    ours, theirs = ours.float(), theirs.float()
    found = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    return found if math.isfinite(found) else math.inf


def _tolerance(keys: Tensor) -> float:
    return 1e-4 if keys.dtype in (torch.float32, torch.float64) else 4e-2


# --- RoPE ---


def rotary_module(model: Any) -> Any:
    """The module that makes cos and sin, shared by all layers."""
    return next((m for m in text_tower(model).modules() if _rotary(m)), None)


def _rotary(module: nn.Module) -> bool:
    named = "otary" in type(module).__name__ or "RoPE" in type(module).__name__
    return (hasattr(module, "rope_type") or hasattr(module, "inv_freq") or named) and hasattr(module, "config")


def position_embeddings(model: Any, positions: Tensor, like: Tensor, kind: str) -> Any:
    """(cos, sin), or what else the model makes of positions for a layer of this kind; None: nothing."""
    rotary = rotary_module(model)
    if rotary is None or not _turns(rotary, kind):
        return None
    make: Callable = rotary
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        return make(like, positions, kind)
    try:
        return make(like, positions)
    except (IndexError, RuntimeError):  # of several axes, which are the same for text
        return make(like, positions[None].expand(3, -1, -1))


def _turns(rotary: Any, kind: str) -> bool:
    """Whether layers of this kind have a RoPE: where each kind has its own, some have none."""
    types = getattr(rotary, "rope_type", None)
    return not isinstance(types, dict) or kind in types


def _candidates(model: Any, kind: str) -> list[Rope]:
    rotary = rotary_module(model)
    if rotary is None or not _turns(rotary, kind):
        return []
    types: Any = getattr(rotary, "rope_type", "default")
    by_kind = isinstance(types, dict)
    named = types[kind] if by_kind else types
    if named in MOVING:
        return []
    prefix = f"{kind}_" if by_kind else ""
    # a longrope's are those of its last step
    found = getattr(rotary, f"{prefix}{'original_' * (named == 'longrope')}inv_freq", None)
    if not isinstance(found, Tensor):
        return []
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    frequencies = found.detach().float().clone()
    most, long = _beyond(rotary, kind if by_kind else None) if named == "longrope" else (0, None)
    signs = [(sign, pairs) for sign in (1, -1) for pairs in (False, True)]
    return [
        Rope(s * frequencies, scaling, pairs, None if long is None else s * long.to(found), most) for s, pairs in signs
    ]


def _beyond(rotary: Any, kind: str | None) -> tuple[int, Tensor]:
    """(tokens beyond which a longrope has other frequencies, those)."""
    settings = rotary.config.rope_parameters if kind is None else rotary.config.rope_parameters[kind]
    most = int(settings["original_max_position_embeddings"])
    more = {} if kind is None else {"layer_type": kind}
    found, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, "cpu", seq_len=most + 1, **more)
    return most, found.detach().float().clone()


# --- modules that are not in memory ---


def kind_of(info: LayerInfo) -> tuple:
    """What makes a layer another kind of layer than its neighbour: class, shapes, settings, RoPE."""
    module = info.module
    shapes = tuple((name, tuple(weight.shape)) for name, weight in module.named_parameters())
    simple = (bool, int, float, str, type(None))
    own = tuple(sorted((k, repr(v)) for k, v in vars(module).items() if isinstance(v, simple) and k != "layer_idx"))
    rope = info.rope
    long = () if rope is None or rope.long is None else tuple(rope.long.tolist())
    turns = None if rope is None else (tuple(rope.inv_freq.tolist()), rope.scaling, rope.interleaved, long, rope.most)
    return info.kind, type(module), shapes, own, turns, info.moves, info.latent


def _drawn(module: Any) -> Any:
    """A copy with random weights: what is seen of a module does not depend on them."""
    draw = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=draw, device="cpu") / max(1, weight.shape[-1]) ** 0.5
        noise = noise + 1 if "norm" in name else noise
        memo[id(weight)] = nn.Parameter(noise.to(weight.dtype), requires_grad=False)
    return copy.deepcopy(module, memo)
