"""Half-precision linear layers where the processor has no half-precision arithmetic."""

import copy

import pytest
import torch
from torch import nn

from kvshrink import half_linear


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(half_linear, "slow_halves", lambda: True)
    return half_linear.in_float32_where_faster(nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16))[0]


@pytest.mark.parametrize("rows", [1, 3, 4, 40])
def test_products_are_those_of_float32_rounded_once(layer, rows):
    x = torch.randn(2, rows, 64).to(torch.bfloat16)
    got = layer(x)
    wanted = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    assert got.dtype is torch.bfloat16
    assert (got.float() - wanted).norm() <= 2**-8 * wanted.norm()
    if 2 * rows >= half_linear.FEW:
        assert got.equal(wanted.to(torch.bfloat16))


def test_it_is_a_linear_layer_that_can_be_copied_trained_and_cast(layer):
    assert isinstance(layer, nn.Linear)
    other = copy.deepcopy(layer)
    assert other(torch.ones(8, 64, dtype=torch.bfloat16)).equal(layer(torch.ones(8, 64, dtype=torch.bfloat16)))
    layer(torch.ones(8, 64, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype is torch.bfloat16
    assert layer.float()(torch.ones(8, 64)).dtype is torch.float32


def test_other_layers_and_other_processors_are_left_alone(monkeypatch):
    class Own(nn.Linear):
        pass

    monkeypatch.setattr(half_linear, "slow_halves", lambda: True)
    model = half_linear.in_float32_where_faster(
        nn.ModuleList([nn.Linear(4, 4), Own(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.float16)])
    )
    assert [type(m) for m in model] == [nn.Linear, Own, half_linear.HalfLinear]
    monkeypatch.setattr(half_linear, "slow_halves", lambda: False)
    model = half_linear.in_float32_where_faster(nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16)]))
    assert type(model[0]) is nn.Linear
