"""Which model is it? A hash by which artifacts and saved caches know the model that they were made for."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvshrink.attach.families import LayerInfo, key_value_weights, text_config


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
