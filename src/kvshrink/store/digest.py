"""A digest of everything that a file holds: plain values and tensors, by name, dtype, shape and bytes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(plain: object, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256, in hexadecimal. Plain values are those of JSON: what is equal as JSON has the same digest."""
    same = json.loads(json.dumps(plain))  # keys that are numbers become text, and are sorted as such
    h = hashlib.sha256(json.dumps(same, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        h.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        h.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def sealed(plain: dict[str, Any]) -> dict[str, Any]:
    """The values with their own digest."""
    return {**plain, "sha256": digest(plain)}


def unsealed(sealed: dict[str, Any]) -> dict[str, Any] | None:
    """The values without their digest; None if it is not theirs."""
    plain = {k: v for k, v in sealed.items() if k != "sha256"}
    return plain if sealed.get("sha256") == digest(plain) else None
