"""What tells one model from another when a run is resumed: all its weights, sampled, and its configuration."""

import hashlib
import json
from typing import Any

SAMPLES = 1024  # numbers of each tensor; a change that touches none of them is no change of a trained matrix
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def model_key(model: Any) -> str:
    """A hash of every parameter and buffer, at evenly spread places, and of the configuration."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
    h = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        part = flat[:: max(1, len(flat) // SAMPLES)].float().cpu()
        h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + part.numpy().tobytes())
    return h.hexdigest()[:16]
