import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.fp8 import FP8

SHAPE = LayerShape(2, 32, torch.float32)


def test_numbers_are_8_bit_floats_of_their_page_s_scale():
    rows = torch.randn(1, 2, 64, 32)
    for codec in FP8().codecs(SHAPE, {}):
        back = codec.decode(codec.encode(rows, None), 2)
        for head in range(2):
            for page in (slice(0, 32), slice(32, 64)):
                x = rows[0, head, page]
                scale = (x.abs().max() / 448).half().float()
                want = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(back[0, head, page], want)


def test_no_number_is_farther_off_than_half_its_last_digit_however_large_later_tokens_are():
    """A scale frozen by the first tokens (transformers, 5.x) clips them."""
    rows = torch.randn(1, 2, 64, 32)
    rows[:, :, 32:] *= 100
    key, _ = FP8().codecs(SHAPE, {})
    back = key.decode(key.encode(rows, None), 2)
    smallest = rows.unflatten(2, (2, 32)).abs().amax((3, 4))[..., None, None] / 448 * 2**-9
    wrong = (back - rows).abs().unflatten(2, (2, 32))
    assert (wrong <= rows.abs().unflatten(2, (2, 32)) * 2**-4 + smallest * 1.01).all()


def test_bits_of_a_head_of_128():
    assert FP8().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048 == 8 + 16 / (32 * 128)
