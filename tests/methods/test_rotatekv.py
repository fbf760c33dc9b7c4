import numpy as np
import pytest
import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.rotatekv import RotateKV
from tests.methods.affine_oracle import hadamard, rounded

SHAPE = LayerShape(4, 16, torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_keys_come_back_as_the_paper_s_steps_say(stats_of, bits):
    """Four heads rotated as one row, channels in falling order of their sum, groups of neighbours rounded, all undone.

    The official code has b^2 - 1 levels, right at 2 alone; here the oracle has 2^b - 1.
    """
    method, stats = RotateKV(bits=bits, group=32), stats_of(SHAPE)
    key, value = method.codecs(SHAPE, method.fit_layer(stats))
    rotated = stats.sample.keys_pre_rope.flatten(1).double().numpy() @ hadamard(64)
    order = np.argsort(-rotated.sum(0), kind="stable")
    rows = stats.sample.keys_pre_rope[:64]
    rotated = (rows.flatten(1).double().numpy() @ hadamard(64)).astype(np.float32)[:, order]
    want = rounded(rotated.reshape(64, 2, 32), bits).reshape(64, 64)[:, np.argsort(order)] @ hadamard(64).T
    back = key.decode(key.encode(rows.transpose(0, 1)[None], None), 4)[0].transpose(0, 1).flatten(1).numpy()
    assert np.mean(np.abs(back - want) > 1e-3 * np.abs(want).max()) < 0.02
    rotated = (stats.sample.values[:64].double().numpy() @ hadamard(16)).astype(np.float32)
    want = rounded(rotated, bits) @ hadamard(16).T
    back = value.decode(value.encode(stats.sample.values[:64].transpose(0, 1)[None], None), 4)[0].transpose(0, 1)
    assert np.mean(np.abs(back.numpy() - want) > 1e-3 * np.abs(want).max()) < 0.02


def test_heads_that_four_does_not_divide_are_rotated_as_far_as_they_can(stats_of):
    for heads, groups in ((1, 1), (2, 1), (6, 3), (8, 2)):
        shape = LayerShape(heads, 8, torch.float32)
        key, value = RotateKV().codecs(shape, RotateKV().fit_layer(stats_of(shape)))
        assert len(key.up) == groups
        assert len(value.up) == heads
        for up in (key.up, value.up):
            torch.testing.assert_close(up @ up.transpose(1, 2), torch.eye(up.shape[1]).expand_as(up), rtol=0, atol=1e-5)


def test_bits_of_a_head_of_128():
    assert RotateKV().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048 == 2.25
