import numpy as np
import pytest
import torch

from kvshrink.errors import DataError
from kvshrink.kernels.affine import dequantize, quantize

BITS = (1, 2, 3, 4, 8)


def formula(x: np.ndarray, bits: int) -> np.ndarray:
    """x' of the docstring's formula in float64, with float16 low and scale."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(float)
    low = low.astype(np.float16).astype(float)
    codes = np.clip(np.rint((x - low) / np.where(scale > 0, scale, 1.0)), 0, 2**bits - 1)
    return codes * scale + low


def clamped_zero_point(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The official CSKV code: an integer zero point, clamped into the code range."""
    top = 2**bits - 1
    scale = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / top
    zero = (-x.amin(-1, keepdim=True) / scale).round().clamp(0, top)
    return (((x / scale).round() + zero).clamp(0, top) - zero) * scale


def error(x: torch.Tensor, back: torch.Tensor) -> float:
    return float((back - x).norm() / x.norm())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 32), (2, 3, 5, 33)], ids=str)
def test_agrees_with_the_formula_in_float64(bits, shape):
    x = torch.randn(shape) * 3 + 1
    codes, scale, low = quantize(x, bits)
    assert scale.dtype == low.dtype == torch.float16
    assert int(codes.max()) < 2**bits
    wanted = formula(x.double().numpy(), bits)
    # a value in the middle of two codes may fall on either side in float32
    off = np.abs(dequantize(codes, scale, low).numpy() - wanted) > 1e-5
    assert off.mean() < 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step(bits):
    x = torch.randn(500, 32)
    codes, scale, low = quantize(x, bits)
    # float16 rounding of low (2^-11 of it) and of the scale, which the last code multiplies
    slack = low.abs().float() * 2**-11 + scale.float() * (2**bits - 1) * 2**-11
    assert bool(((dequantize(codes, scale, low) - x).abs() <= scale.float() / 2 + slack).all())


@pytest.mark.parametrize(
    ("mean", "most", "official"), [(3, 0.026, 0.098), (4, 0.020, 0.183), (6, 0.014, 0.363), (10, 0.009, 0.595)]
)
def test_one_sided_groups_are_not_clipped(mean, most, official):
    """Groups of 32 tokens whose values share one sign, 4 bits: the official formula is the defect to beat."""
    x = torch.randn(4000, 32) + mean
    assert error(x, clamped_zero_point(x, 4)) == pytest.approx(official, abs=0.01)
    assert error(x, dequantize(*quantize(x, 4))) <= most
    assert error(-x, dequantize(*quantize(-x, 4))) <= most


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, -3.25, 1000.0, 65504.0, 0.1, -7e-9])
def test_constant_groups_are_exact(bits, value):
    """As exact as the float16 that holds them."""
    x = torch.full((3, 32), value)
    codes, scale, low = quantize(x, bits)
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(dequantize(codes, scale, low), x.half().float())


def test_a_group_of_one_is_its_low():
    x = torch.tensor([[0.5], [-2.0]])
    assert torch.equal(dequantize(*quantize(x, 4)), x)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_invalid_elements_do_not_matter(junk):
    x = torch.randn(6, 32)
    valid = torch.rand(6, 32) > 0.4
    valid[0], valid[1] = False, True
    clean = quantize(x.where(valid, torch.zeros(())), 4, valid)
    for one, other in zip(quantize(x.where(valid, torch.tensor(junk)), 4, valid), clean, strict=True):
        assert torch.equal(one, other)
    back = dequantize(*clean)
    assert back.isfinite().all()
    for row in range(1, 6):  # minimum and maximum are those of the valid elements alone
        alone = x[row][valid[row]]
        torch.testing.assert_close(back[row][valid[row]], dequantize(*quantize(alone[None], 4))[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_values_that_cannot_be_stored_are_refused(bad, masked):
    x = torch.randn(4, 32)
    x[2, 7] = bad
    valid = torch.ones(4, 32, dtype=torch.bool) if masked else None
    with pytest.raises(DataError, match=r"^cannot quantise values .* to 4 bits: .*65504.*bits=None\.$"):
        quantize(x, 4, valid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_are_computed_in_float32(dtype):
    x = torch.randn(20, 32).to(dtype)
    for small, wide in zip(quantize(x, 4), quantize(x.float(), 4), strict=True):
        assert torch.equal(small, wide)


def test_input_is_not_changed():
    x = torch.randn(3, 32)
    before = x.clone()
    dequantize(*quantize(x, 2, torch.rand(3, 32) > 0.5))
    assert torch.equal(x, before)
