"""Which model is it? Read from the model whenever it is asked, so that weights that changed since are noticed.

Of every tensor SAMPLES numbers count, in short runs spread over it: a change that touches none of them is no change of
a trained matrix. What wraps a model (a head, PEFT, torch.compile) does not change its identity; an adapter does as long
as it acts and is not all zero, and one that is merged has changed the weights themselves.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvshrink.attach.families import text_config, text_tower
from kvshrink.errors import UnsupportedModelError
from kvshrink.identity import Identity, sketch
from kvshrink.store.modes import own_modes

SAMPLES, RUN = 1024, 8  # numbers of a tensor, of which so many lie side by side: a page of a file read for each run
KEPT = 32  # of them that are kept for comparison
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# settings by which the keys and values of a token do not change, or of which only predictions know
IDLE = {
    "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "dtype", "eos_token_id", "final_logit_softcapping", "finetuning_task", "id2label", "initializer_range",
    "label2id", "logit_scale", "max_position_embeddings", "name_or_path", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "router_aux_loss_coef", "sep_token_id", "task_specific_params",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
VOLATILE = {"name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}

Stored = Callable[[str, Tensor], Tensor]  # a tensor by its name in the decoder, where that has only its shape


@own_modes
def identity_of(model: Any, stored: Stored | None = None) -> Identity:
    """Of a loaded model, or with `stored` of one whose weights are read from elsewhere."""
    decoder = decoder_of(model)
    settings = settings_of(decoder)
    sampled = _acting(_sampled(weights(decoder), stored))
    sketches = {name: sketch(dtype, shape, numbers[:: SAMPLES // KEPT]) for name, (dtype, shape, numbers) in sampled}
    return Identity(settings, sketches, _digest(settings, sampled))


def model_key(model: Any) -> str:
    """A hash of all that an answer of the model depends on: identity as it is in this dtype, head and configuration."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE and not k.startswith("_")}
    head = model.get_output_embeddings()
    own = [] if head is None else _sampled(weights(head), None)
    return _digest([identity_of(model).digest, config], own)


def decoder_of(model: Any) -> Any:
    """The part of a model that fills a cache, through whatever wraps it."""
    return _unwrapped(text_tower(model))


def weights(module: nn.Module, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that act, under the names that they have in a model that nothing wraps."""
    module = _unwrapped(module)
    if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):  # a layer of PEFT
        yield from _adapted(module, name)
        return
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # one that PEFT trained whole
        yield from weights(_trained(module), name)
        return
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and not (key.endswith("inv_freq") and _rewritten(module, key)):
            yield f"{name}{key}", tensor
    for key, child in module._modules.items():
        if child is not None:
            yield from weights(child, f"{name}{key}.")


def _rewritten(module: Any, key: str) -> bool:
    """Whether a step writes these frequencies, by how far it reaches; what they are made of is in the settings."""
    types: Any = getattr(module, "rope_type", None)
    own = types.get(key.removesuffix("_inv_freq")) if isinstance(types, dict) else types
    return own in ("dynamic", "longrope") and "original" not in key


def _unwrapped(module: Any) -> Any:
    while wrapper := next((w for w in WRAPPERS if w in getattr(module, "_modules", ())), None):
        module = module._modules[wrapper]
    return module


def _adapted(module: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """A layer under its adapters, and those of them that its forward would use."""
    if module.disable_adapters and module.merged:
        module.unmerge()  # as its forward does first
    yield from weights(module.base_layer, name)
    if module.disable_adapters or module.merged:
        return
    kinds = [*module.adapter_layer_names, *getattr(module, "other_param_names", ())]
    for n, adapter in enumerate(module.active_adapters):
        for kind in kinds:
            parts: Any = getattr(module, kind, None)
            if not hasattr(parts, "keys") or adapter not in parts:
                continue
            part: Any = parts[adapter]
            at = f"{name}adapter.{n}.{kind}"
            if isinstance(part, nn.Module):
                yield from weights(part, f"{at}.")
            elif isinstance(part, Tensor):
                yield at, part
            elif kind == "scaling":
                yield at, torch.tensor([float(part)])


def _trained(module: Any) -> Any:
    name = next((a for a in module.active_adapters if a in module.modules_to_save), None)
    return module.original_module if name is None or module.disable_adapters else module.modules_to_save[name]


def settings_of(decoder: Any) -> dict[str, Any]:
    """The settings that change what a cache holds or means, and the numbers that modules made of them."""
    config = text_config(decoder).to_dict()
    found = {k: v for k, v in config.items() if k not in IDLE and "dropout" not in k and not k.startswith("_")}
    numbers: dict[str, list[float]] = {}
    for module in decoder.modules():
        for key, value in vars(module).items():
            if type(value) is float and "dropout" not in key and not isinstance(module, nn.modules.dropout._DropoutNd):
                numbers.setdefault(f"modules' {key}", []).append(value)
    short = {k: v[0] if len(set(v)) == 1 else v for k, v in numbers.items()}
    plain: dict[str, Any] = json.loads(json.dumps(_finite(found | short), sort_keys=True, default=str))
    return plain


def _finite(value: Any) -> Any:
    """Infinite numbers as text, which JSON has no other form for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


Sampled = list[tuple[str, tuple[str, tuple[int, ...], np.ndarray]]]  # name; dtype, shape, numbers


@torch.no_grad()
def _sampled(tensors: Iterator[tuple[str, Tensor]], stored: Stored | None) -> Sampled:
    """Numbers of each tensor, copied from every device at once; bytes of what is no float of two bytes or more."""
    names, shapes, parts = [], [], []
    for name, tensor in tensors:
        for inner in plain_tensors(tensor if stored is None else stored(name, tensor)):
            if inner.is_meta:
                raise UnsupportedModelError(
                    f"{name} is not in memory: it was offloaded or never loaded. Load the model whole, on one device."
                )
            names.append(name)
            shapes.append((str(inner.dtype).removeprefix("torch."), tuple(inner.shape)))
            parts.append(torch.take(inner, places(inner.numel(), inner.device)))
    return [(n, (*s, p)) for n, s, p in zip(names, shapes, _copied(parts), strict=True)]


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """A tensor as ordinary ones: quantised and sharded ones are made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [x for name in tensor.__tensor_flatten__()[0] for x in plain_tensors(getattr(tensor, name))]
    if tensor.is_complex():
        return [torch.view_as_real(tensor)]
    return [tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor]


def _copied(parts: list[Tensor]) -> list[np.ndarray]:
    """Floats as float32, integers as bytes; one copy for each kind of tensor."""
    kinds: dict[tuple, list[int]] = {}
    for i, part in enumerate(parts):
        kinds.setdefault((part.device, part.dtype), []).append(i)
    found: dict[int, np.ndarray] = {}
    for (_, dtype), own in kinds.items():
        joined = torch.cat([parts[i] for i in own]).cpu()
        numbers = (joined.float() if dtype.is_floating_point else joined.view(torch.uint8)).numpy()
        wide = 1 if dtype.is_floating_point else dtype.itemsize
        ends = np.cumsum([parts[i].numel() * wide for i in own])[:-1]
        found |= dict(zip(own, np.split(numbers, ends), strict=True))
    return [found[i] for i in range(len(parts))]


@lru_cache(256)
def places(count: int, device: torch.device) -> Tensor:
    """Where to look in a tensor of so many numbers: all of a small one, else short runs, by the golden ratio.

    Even steps would meet the same columns in every row.
    """
    if count <= SAMPLES:
        return torch.arange(count, device=device)
    runs = torch.arange(1, SAMPLES // RUN + 1, dtype=torch.float64) * ((5**0.5 - 1) / 2)
    starts = ((runs - runs.floor()) * (count - RUN)).long().sort().values
    return (starts[:, None] + torch.arange(RUN)).flatten().to(device)


def _acting(sampled: Sampled) -> Sampled:
    """Without LoRAs whose second factor is still all zero, as it begins: they add nothing."""
    second: dict[str, bool] = {}
    for name, (_, _, numbers) in sampled:
        at, _, kind = name.partition(".lora_")
        if kind.startswith(("B", "embedding_B", "magnitude")):
            second[at] = second.get(at, False) or kind.startswith("magnitude") or bool(numbers.any())
    idle = [f"{at}." for at, acts in second.items() if not acts]
    return [x for x in sampled if not x[0].startswith(tuple(idle))] if idle else sampled


def _digest(settings: object, sampled: Sampled) -> str:
    h = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, (dtype, shape, numbers) in sampled:
        h.update(f"{name}{shape}{dtype}".encode() + numbers.tobytes())
    return h.hexdigest()[:16]
