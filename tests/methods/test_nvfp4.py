import pytest
import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.nvfp4 import NVFP4

SHAPE = LayerShape(2, 32, torch.float32)
E2M1 = [s * 2.0 ** (e - 1) * (1 + m / 2) if e else s * m / 2 for s in (1, -1) for e in range(4) for m in range(2)]


def test_a_number_is_a_4_bit_float_times_its_block_s_scale():
    """Sign, two bits of exponent with bias 1, one of mantissa; the nearest one."""
    rows = torch.randn(1, 2, 64, 32) * torch.logspace(-2, 2, 64)[:, None]
    codec = NVFP4().codecs(SHAPE, {})[1]
    stored = codec.encode(rows, None)
    back = codec.decode(stored, 2)
    top = stored["scale_top"].transpose(1, 2).repeat_interleave(32, 2)[..., None]  # [b, h, t, 1]
    scale = stored["scale"].view(torch.float8_e4m3fn).float().transpose(1, 2).flatten(2, 3) * top
    scale = scale.repeat_interleave(16, -1)
    grid = torch.tensor(E2M1)
    want = grid[(rows / scale)[..., None].sub(grid).abs().argmin(-1)] * scale
    assert float((back - want).abs().gt(1e-6 * scale).float().mean()) < 0.01  # a tie may fall to either
    assert float(((back - rows).abs() / scale).max()) <= 1.0 + 0.4  # half a step at the top, and the scale's rounding


def test_later_tokens_that_are_larger_are_not_clipped():
    """transformers' and serving engines' scale of a whole tensor is frozen by the first tokens."""
    rows = torch.randn(1, 2, 64, 32)
    rows[:, :, 32:] *= 1000
    for codec in NVFP4(rotate=True).codecs(SHAPE, {}):
        back = codec.decode(codec.encode(rows, None), 2)
        for part in (slice(0, 32), slice(32, 64)):
            error = (back - rows)[:, :, part].norm() / rows[:, :, part].norm()
            assert 0.05 < float(error) < 0.13


def test_blocks_of_16_are_rotated_and_queries_with_them():
    key, value = NVFP4(rotate=True).codecs(SHAPE, {})
    rows, query = torch.randn(1, 2, 32, 32), torch.randn(1, 2, 2, 32)
    torch.testing.assert_close(key.project(rows)[..., :16].norm(dim=-1), rows[..., :16].norm(dim=-1))
    exact = query @ rows.transpose(2, 3)
    torch.testing.assert_close(key.absorb(query) @ key.project(rows).transpose(2, 3), exact, rtol=1e-5, atol=1e-5)
    assert value.expand(rows, 2) is rows


def test_bits_of_a_head_of_128():
    bits = NVFP4().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048
    assert bits == pytest.approx(4.5, abs=0.01)
