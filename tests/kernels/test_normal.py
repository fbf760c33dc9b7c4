"""The Lloyd-Max quantiser of a unit normal, against published errors, the optimality conditions and its own codes."""

import pytest
import torch

from kvshrink.kernels.normal import from_codes, to_codes
from kvshrink.kernels.normal.reference import expected_error, levels


@pytest.mark.parametrize(("bits", "error"), [(0, 1.0), (1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_error_is_max_s_table(bits, error):
    """Golden source: J. Max, Quantizing for minimum distortion, IRE Trans. 6 (1960), Table I."""
    assert expected_error(bits) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_means_of_their_cells(bits):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(3))
    codes = to_codes(x, bits)
    for code, level in enumerate(levels(bits).tolist()):
        assert float(x[codes == code].mean()) == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_code_is_the_nearest_level_and_error_is_as_expected(bits):
    x = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(1)), torch.tensor([-99.0, 99.0])])
    codes, table = to_codes(x, bits), levels(bits).float()
    nearest = (x[:2000, None] - table).abs().argmin(1)
    assert torch.equal(codes[:2000].long(), nearest)
    assert codes[-2:].tolist() == [0, 2**bits - 1]
    back = from_codes(codes, bits)
    assert float((back - x)[:-2].square().mean()) == pytest.approx(expected_error(bits), rel=0.1)


def test_eight_bits_are_near_the_high_rate_law():
    """Panter and Dite: pi sqrt(3) / 2 * 4^-bits."""
    law = torch.pi * 3**0.5 / 2 / 4**8
    assert expected_error(8) == pytest.approx(law, rel=0.05)


def test_codes_keep_their_shape_also_when_empty():
    assert from_codes(to_codes(torch.zeros(2, 0, 3), 2), 2).shape == (2, 0, 3)
