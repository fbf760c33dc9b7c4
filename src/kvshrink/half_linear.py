"""Half-precision linear layers on processors without half-precision arithmetic, where torch multiplies one by one.

On such a processor (x86 up to AVX2) a bfloat16 product of many rows takes eight times a float32 one. It is then
computed in float32 and rounded once, as processors with bfloat16 products do; weights stay as they are.
"""

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

HALF = (torch.bfloat16, torch.float16)
FEW = 4  # rows; below them the weights' conversion takes longer than it saves


class HalfLinear(nn.Linear):
    """nn.Linear whose products of many rows are in float32."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype not in HALF or input.device.type != "cpu" or input.numel() < FEW * self.in_features:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return linear(input.float(), self.weight.float(), bias).to(input.dtype)


def in_float32_where_faster(model: Any) -> Any:
    """The same model, its linear layers made faster on such a processor."""
    if slow_halves():
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype in HALF:
                module.__class__ = HalfLinear
    return model


@cache
def slow_halves() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and "512" not in torch.backends.cpu.get_cpu_capability()
