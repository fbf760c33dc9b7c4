import numpy as np
import pytest
import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.kitty import Kitty
from tests.methods.affine_oracle import rounded

SHAPE = LayerShape(2, 64, torch.float32)


def test_the_largest_channels_of_each_page_have_16_levels_and_the_others_4():
    rows = torch.randn(1, 2, 256, 64) * torch.rand(64)
    rows[:, :, :128, 3] += 20  # another channel is large in each page, and in each head
    rows[:, :, 128:, 40] -= 20
    rows[:, 1, :, 11] += 20
    key, value = Kitty().codecs(SHAPE, {})
    back = key.decode(key.encode(rows, None), 2).numpy()
    for head in range(2):
        for page in range(2):
            x = rows[0, head, 128 * page : 128 * page + 128].numpy()
            boosted = np.argsort(-np.abs(x).mean(0), kind="stable")[:8]
            want = rounded(x.T, 2)
            want[boosted] = rounded(x.T[boosted], 4)
            np.testing.assert_allclose(back[0, head, 128 * page : 128 * page + 128], want.T, rtol=0, atol=1e-5)
            assert (3 if page == 0 else 40) in boosted
    want = torch.from_numpy(rounded(rows, 2))
    torch.testing.assert_close(value.decode(value.encode(rows, None), 2), want, rtol=0, atol=1e-5)


def test_bits_of_a_head_of_128():
    """Keys 2 + 2/8 + 32/128 and a mask, values 2 + 32/128."""
    bits = Kitty().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048
    assert bits == pytest.approx((2.5 + 1 / 128 + 2.25) / 2)
