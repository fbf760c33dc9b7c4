"""A copy of one attention module to try things on: the model itself is not changed, nor switched to eval.

Float weights come as float32 (those that are float32 already are shared), so that what a bfloat16 model rounds away
cannot hide a difference. Weights that are stored in another way stay as they are.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvshrink.attach.families import LayerInfo
from kvshrink.store.plain import is_plain

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Twin:
    """The copy, with a config of its own, and how exact its answers are."""

    def __init__(self, info: LayerInfo) -> None:
        weights = [*info.module.parameters(), *info.module.buffers()]
        plain = all(is_plain(t) and t.dtype in FLOATS for t in weights if t.is_floating_point())
        plain = plain and all(w.is_floating_point() for w in info.module.parameters())
        memo: dict[int, Any] = {id(t): _wide(t) if plain else t for t in weights}
        for part in info.module.modules():  # what others hooked to the module is theirs to run
            memo |= {id(value): type(value)() for name, value in vars(part).items() if name.endswith("_hooks")}
        self.module: Any = copy.deepcopy(info.module, memo).eval()
        self.info = replace(info, module=self.module)
        self.dtype = torch.float32 if plain else None  # None: as the module computes
        self.tolerance = 1e-4 + 20 * _noise(weights[0].device) if plain else 4e-2


def _wide(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == torch.float32:
        return tensor
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _noise(device: torch.device) -> float:
    """Relative error of a float32 product: 1e-6, or 1e-3 where the user lets it be rounded (TF32)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 64, generator=generator, dtype=torch.float32, device="cpu").to(device)
    exact = a.double() @ b.double()
    return float(((a @ b) - exact).abs().max() / exact.abs().max())
