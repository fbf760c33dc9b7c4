"""Whether a model changed since it was last looked at: a few numbers of each of its tensors, gathered in one go.

It runs before every forward of more than one token, so it is written to be quick: about 3 us a tensor.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kvshrink.attach.identity import plain_tensors
from kvshrink.store.plain import is_plain

NUMBERS = 4  # of a tensor


class Glance:
    """modules: which there are, and for those of PEFT which adapters act. numbers: by device and dtype."""

    @torch.no_grad()
    def __init__(self, decoder: nn.Module) -> None:
        self.modules: list[Any] = []
        self.numbers: list[Tensor] = []
        parts: dict[tuple, list[Tensor]] = {}
        todo = [decoder]
        while todo:
            module = todo.pop()
            self.modules.append(id(module))
            if hasattr(module, "adapter_layer_names"):
                self.modules.append((module.disable_adapters, *module.active_adapters, *module.merged_adapters))
                self.modules.append(repr(getattr(module, "scaling", None)))
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    for inner in () if tensor is None else _inside(tensor):
                        parts.setdefault((inner.device, inner.dtype), []).append(_some(inner))
            todo += [child for child in module._modules.values() if child is not None]
        self.numbers = [torch.cat(same) for same in parts.values()]

    def same(self, other: "Glance") -> bool:
        return (
            self.modules == other.modules
            and [(x.device, x.dtype, x.shape) for x in self.numbers]
            == [(x.device, x.dtype, x.shape) for x in other.numbers]
            and all(map(torch.equal, self.numbers, other.numbers))
        )


def _inside(tensor: Tensor) -> list[Tensor]:
    """The tensor itself, or the plain ones that a quantised or sharded one is made of."""
    return [tensor] if is_plain(tensor) else plain_tensors(tensor)


def _some(tensor: Tensor) -> Tensor:
    """Numbers from the middle."""
    count = tensor.numel()
    if count <= NUMBERS:
        return tensor.flatten()
    if not tensor.is_contiguous() or not is_plain(tensor):
        return tensor[(0,) * (tensor.dim() - 1)][:NUMBERS]
    return tensor.as_strided((NUMBERS,), (1,), tensor.storage_offset() + (count - NUMBERS) // 2)
