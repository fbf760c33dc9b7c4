import math

import pytest
import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.block_float import BlockFloat

SHAPE = LayerShape(2, 64, torch.float32)


def plain(bits: int, group: int, d: int = 64) -> tuple:
    order = torch.arange(d).expand(2, -1)
    method = BlockFloat(bits=bits, group=group)
    return method.codecs(LayerShape(2, d, torch.float32), {"key_order": order, "value_order": order})


def test_a_block_by_hand():
    """Largest magnitude 6.5: 6.5 / 7 needs a step of 1, so 6.5 is 6 (to even), 1.2 is 1 and -3.6 is -4."""
    rows = torch.zeros(1, 2, 32, 4)
    rows[..., :] = torch.tensor([6.5, 1.2, -3.6, 0.4])
    rows[:, :, 1] *= 1 / 8
    key, _ = plain(4, 32, 4)
    stored = key.encode(rows, None)
    back = key.decode(stored, 2)
    assert set(stored["scale"].flatten().tolist()) == {127, 124}
    assert back[0, 0, 0].tolist() in ([6.0, 1.0, -4.0, 0.0], [7.0, 1.0, -4.0, 0.0])
    assert torch.equal(back[:, :, 1], back[:, :, 0] / 8)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_steps_are_powers_of_two_and_no_number_is_farther_off_than_half_a_step(bits):
    rows = torch.randn(1, 2, 64, 64) * torch.logspace(-3, 3, 64)[:, None]
    for codec in plain(bits, 16):
        back = codec.decode(codec.encode(rows, None), 2)
        for t in range(64):
            for block in range(4):
                at = (0, 1, t, slice(16 * block, 16 * block + 16))
                step = 2.0 ** math.ceil(math.log2(float(rows[at].abs().max()) / (2 ** (bits - 1) - 1)))
                assert float((back[at] - rows[at]).abs().max()) <= step / 2 * 1.0001
                assert torch.equal(back[at] / step, (back[at] / step).round())


def test_sorted_channels_lose_less(stats_of):
    keys = torch.randn(320, 128)
    keys[:, torch.arange(5, 128, 16)] *= 30  # one large channel in every block of 16
    stats = stats_of(SHAPE, keys, pairs=None)
    method = BlockFloat(group=16)
    fitted = method.fit_layer(stats)
    assert (stats.sample.keys_post_rope.square().mean(0).gather(1, fitted["key_order"]).diff(dim=1) <= 0).all()
    rows = stats.sample.keys_post_rope[:64].transpose(0, 1)[None]
    small = (rows.abs().amax(2, keepdim=True) < 10).expand_as(rows)

    def error(codec) -> float:
        return float((codec.decode(codec.encode(rows, None), 2) - rows)[small].square().mean())

    assert error(method.codecs(SHAPE, fitted)[0]) < 0.5 * error(plain(4, 16)[0])


def test_bits_of_a_head_of_128():
    assert BlockFloat().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048 == 4.25
