"""TCQ against its law: a rotated row's error is that of the trellis code, for any channel that stands out."""

import pytest
import torch

from kvshrink.kernels.trellis import expected_error
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.tcq import TCQ
from kvshrink.methods.quant.turboquant import TurboQuant

SHAPE = LayerShape(2, 128, torch.float32)


def standing_out(tokens: int) -> torch.Tensor:
    """Rows [1, 2, tokens, 128] with a channel ten times the others'."""
    rows = torch.randn(1, 2, tokens, 128)
    rows[..., 5] *= 10
    return rows


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_is_the_trellis_codes_for_any_channel_that_stands_out(bits):
    for codec in TCQ(bits=bits).codecs(SHAPE, {}):
        for rows in (torch.randn(1, 2, 256, 128) * 3, standing_out(256)):
            back = codec.decode(codec.encode(rows, None), 2)
            error = float((back - rows).square().sum() / rows.square().sum())
            assert 0.85 * expected_error(bits) < error < 1.4 * expected_error(bits)


def test_a_page_costs_its_codes_and_a_gain_for_16_channels():
    assert TCQ(bits=2).bits_per_token(SHAPE, {}) / (2 * SHAPE.width) == 2 + 16 / (16 * 32)


def test_less_error_than_scalar_codes_in_fewer_bytes():
    ours, theirs, rows = TCQ(bits=2), TurboQuant(bits=2), torch.randn(1, 2, 256, 128)
    assert ours.bits_per_token(SHAPE, {}) < theirs.bits_per_token(SHAPE, {})
    error = {}
    for method in (ours, theirs):
        codec = method.codecs(SHAPE, {})[1]
        error[method] = float((codec.decode(codec.encode(rows, None), 2) - rows).square().mean())
    assert error[ours] < 0.8 * error[theirs]


def test_queries_meet_the_codes_without_a_key_being_turned_back():
    key, _ = TCQ(bits=4).codecs(SHAPE, {})
    rows, query = torch.randn(1, 2, 64, 128), torch.randn(1, 2, 3, 128)
    stored = key.encode(rows, None)
    direct = query @ key.decode(stored, 2).transpose(2, 3)
    torch.testing.assert_close(key.absorb(query) @ key.unpack(stored).transpose(2, 3), direct, rtol=1e-4, atol=1e-4)
