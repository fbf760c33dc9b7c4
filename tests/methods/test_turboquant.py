"""TurboQuant against its law: the error of a unit normal number's best code, whatever the rows were."""

import pytest
import torch

from kvshrink.kernels.normal.reference import expected_error
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.turboquant import TurboQuant

SHAPE = LayerShape(2, 128, torch.float32)


def outliers(tokens: int) -> torch.Tensor:
    """Rows [1, 2, tokens, 128] with one channel a hundred times the others', and rows of one channel alone."""
    rows = torch.randn(1, 2, tokens, 128)
    rows[..., 5] *= 100
    rows[:, :, ::2] = 0
    rows[:, :, ::2, 7] = 400.0
    return rows


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_is_that_of_a_normal_number_for_any_rows(bits):
    """Theorem 1's constant: .36, .117, .03 and .009 of a row's energy, rotated rows being close to normal."""
    for codec in TurboQuant(bits=bits).codecs(SHAPE, {}):
        for rows in (torch.randn(1, 2, 512, 128) * 3, outliers(512)):
            back = codec.decode(codec.encode(rows, None), 2)
            error = float((back - rows).square().sum() / rows.square().sum())
            assert error == pytest.approx(expected_error(bits), rel=0.25)


def test_queries_meet_the_codes_without_a_key_being_turned_back():
    key, _ = TurboQuant(bits=4).codecs(SHAPE, {})
    rows, query = torch.randn(1, 2, 64, 128), torch.randn(1, 2, 3, 128)
    stored = key.encode(rows, None)
    direct = query @ key.decode(stored, 2).transpose(2, 3)
    torch.testing.assert_close(key.absorb(query) @ key.unpack(stored).transpose(2, 3), direct, rtol=1e-4, atol=1e-4)


def test_a_row_costs_its_codes_and_one_norm():
    assert TurboQuant(bits=4).bits_per_token(SHAPE, {}) / (2 * SHAPE.width) == 4 + 16 / 128
