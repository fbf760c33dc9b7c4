"""Which object is attached: the transformers model inside what a caller holds, such as a PEFT wrapper or a pipeline.

All wrappers of one model share its modules, so they must share its attachment too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvshrink.errors import SettingError, UnsupportedModelError

OWN_CACHE = {"PREFIX_TUNING", "CARTRIDGE"}  # methods of PEFT that put a cache of their own in the place of ours


def transformers_model(given: Any) -> PreTrainedModel:
    """The model itself, or the one inside a pipeline, a PEFT wrapper, a compiled or a parallel module.

    Raises SettingError for anything else, UnsupportedModelError for a wrapper that would not use a cache of ours.
    """
    module = given if isinstance(given, nn.Module) else getattr(given, "model", None)
    if not isinstance(module, nn.Module):
        raise SettingError(
            f"{_short(given)} is not a model. Pass a loaded transformers model, such as "
            "AutoModelForCausalLM.from_pretrained(...), a pipeline, or a wrapper of one."
        )
    found = list(_outermost(module))
    if len(found) != 1:
        raise SettingError(f"{type(given).__name__} holds {len(found)} transformers models, not one. Pass the model.")
    return found[0]


def check_loaded(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if some weights are not in memory between calls."""
    weights = list(model.parameters())
    away = sum(weight.is_meta for weight in weights)
    if away:
        raise UnsupportedModelError(
            f"{away} of {len(weights)} weights of {type(model).__name__} are not in memory (offloaded by accelerate, "
            "or never loaded). Load the whole model on one or more devices, without offload to CPU or disk."
        )


def unpack(model: PreTrainedModel) -> None:
    """Let a model that unpacks its weights when it first runs (compressed-tensors) do so: no layer can run before."""
    if any(isinstance(m, nn.Linear) and not hasattr(m, "weight") for m in model.modules()):
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        yield module
        return
    _check_wrapper(module)
    for child in module.children():
        yield from _outermost(child)


def _check_wrapper(module: nn.Module) -> None:
    adapters = getattr(module, "peft_config", None)
    for adapter in adapters.values() if isinstance(adapters, dict) else ():
        kind = str(getattr(adapter, "peft_type", "")).removeprefix("PeftType.")
        if kind in OWN_CACHE:
            raise UnsupportedModelError(
                f"PEFT's {kind} passes a cache of its own to the model, so that ours would stay empty. "
                "Use a LoRA, or another adapter that changes weights."
            )


def _short(given: Any) -> str:
    text = repr(given).splitlines()[0]
    return text if len(text) <= 60 else f"{type(given).__name__} object"
