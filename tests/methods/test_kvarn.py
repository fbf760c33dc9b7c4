"""KVarN: pages alike on both sides, what that is worth beside outliers, and bytes by hand."""

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._packing.base import paged, there
from kvshrink.methods._packing.sinkhorn import factors
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.kvarn import KVarN
from kvshrink.methods.quant.saw_int4 import SAWInt4

SHAPE = LayerShape(2, 64, torch.float32)
LLAMA = LayerShape(8, 128, torch.float16)


def back(method, rows):
    return [c.decode(c.encode(rows, None), SHAPE.heads) for c in method.codecs(SHAPE, {})]


def rows_with_outliers(tokens=256):
    """Tokens and channels of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 2, tokens, 64, generator=draw)
    return rows * torch.logspace(-1, 1, 64) * torch.exp(torch.randn(1, 2, tokens, 1, generator=draw))


def test_bits_of_a_llama_layer_by_hand():
    """Keys 4 and values 2; a scale and a low of 16 bits a token and head, a factor of 16 a channel and 128 tokens."""
    assert KVarN().bits_per_token(LLAMA, {}) == 1024 * (4 + 2 + 2 * (32 / 128 + 16 / 128))
    assert KVarN(bits=2, value_bits=None).bits_per_token(LLAMA, {}) == 2048 * (2 + 0.375)


def test_tokens_and_channels_are_alike_afterwards():
    pages = paged(rows_with_outliers(), 128)
    even = pages / factors(pages, None)[..., None, :]
    even = even / even.square().mean(4, keepdim=True).sqrt()
    channels = even.square().mean(3).sqrt()
    before = pages.square().mean(3).sqrt()
    assert channels.max() / channels.min() < 1.02
    assert before.max() / before.min() > 10


def test_pads_do_not_count():
    pages = paged(rows_with_outliers(128), 128)
    valid = (torch.arange(128) >= 50)[None]
    loud = torch.where(there(valid, 128), pages, 1e4)
    torch.testing.assert_close(factors(loud, there(valid, 128)), factors(pages * valid[0, :, None], there(valid, 128)))
    assert factors(torch.zeros_like(pages), None).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_than_the_same_codes_without_it(bits):
    """SAW-INT4 is the rotation and the codes alone."""
    draw = torch.Generator().manual_seed(1)
    mixing = torch.linalg.qr(torch.randn(64, 64, generator=draw)).Q
    rows = torch.randn(1, 2, 256, 64, generator=draw) * torch.logspace(-1, 1, 64) @ mixing
    ours, plain = (
        [float((x - rows).square().sum()) for x in back(method, rows)]
        for method in (KVarN(bits=bits, value_bits=None), SAWInt4(bits=bits))
    )
    for less, more in zip(ours, plain, strict=True):
        assert less < 0.95 * more


def test_pages_of_few_directions_are_stored_too():
    """A constant page has one channel after the rotation, whose factor float16 could not hold."""
    for rows in (torch.ones(1, 2, 128, 64), torch.zeros(1, 2, 128, 64), torch.eye(64).repeat(1, 2, 2, 1)):
        for found in back(KVarN(value_bits=None), rows):
            assert (found - rows).norm() <= 0.1 * rows.norm() + 1e-6


def test_values_have_bits_of_their_own():
    rows = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(2))
    keys, values = (float((x - rows).square().mean()) for x in back(KVarN(), rows))
    same = [float((x - rows).square().mean()) for x in back(KVarN(value_bits=None), rows)]
    assert keys == same[0] == pytest.approx(same[1])
    assert values > 10 * keys


@pytest.mark.parametrize("settings", [{"bits": 5}, {"value_bits": 1}, {"value_bits": 16}])
def test_settings_that_are_refused(settings):
    with pytest.raises(SettingError, match="is not possible"):
        KVarN(**settings)
