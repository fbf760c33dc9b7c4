import numpy as np
import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.rtn import RTN
from kvshrink.methods.quant.saw_int4 import SAWInt4
from tests.methods.affine_oracle import hadamard, rounded

SHAPE = LayerShape(2, 64, torch.float32)


@pytest.mark.parametrize(("bits", "group", "block"), [(4, 128, 128), (3, 32, 16), (2, 16, 64)])
def test_rows_come_back_as_the_formula_says(bits, group, block):
    rows = torch.randn(1, 2, 64, 64)
    matrix = np.kron(np.eye(64 // min(block, 64)), hadamard(min(block, 64)))
    rotated = (rows.double().numpy() @ matrix).astype(np.float32)
    want = rounded(rotated.reshape(*rotated.shape[:3], -1, min(group, 64)), bits).reshape(rotated.shape) @ matrix.T
    for codec in SAWInt4(bits=bits, group=group, block=block).codecs(SHAPE, {}):
        back = codec.decode(codec.encode(rows, None), 2).numpy()
        # a number on the border of two codes may fall to either
        assert np.mean(np.abs(back - want) > 1e-3) < 0.02


def test_an_outlier_channel_costs_less_than_without_the_rotation():
    rows = torch.randn(1, 2, 256, 64)
    rows[..., 9] += 30

    def error(method) -> float:
        key, _ = method.codecs(SHAPE, {})
        return float((key.decode(key.encode(rows, None), 2) - rows).square().mean())

    assert error(SAWInt4(bits=4)) < 0.2 * error(RTN(bits=4, key_axis="token", group=64))


def test_bits_of_a_head_of_128():
    assert SAWInt4().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048 == 4.25


def test_wrong_settings_are_refused():
    for wrong in ({"bits": 5}, {"group": 0}, {"block": -1}):
        with pytest.raises(SettingError, match="Use"):
            SAWInt4(**wrong)
