import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.kernels.affine import dequantize, quantize
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.rtn import RTN

SHAPE = LayerShape(2, 40, torch.bfloat16)  # 40 channels: the second group of 32 has 8


def test_no_bits_are_lossless():
    rows = torch.randn(1, 2, 64, 40).bfloat16()
    for codec in RTN(bits=None).codecs(SHAPE, {}):
        assert torch.equal(codec.decode(codec.encode(rows, None), 2), rows.float())


def test_keys_have_a_scale_per_channel_and_page():
    rows = torch.randn(1, 2, 64, 40)
    key, _ = RTN(bits=4).codecs(SHAPE, {})
    back = key.decode(key.encode(rows, None), 2)
    for page in rows.split(32, 2), back.split(32, 2):
        assert len(page) == 2
    for page, got in zip(rows.split(32, 2), back.split(32, 2), strict=True):
        want = dequantize(*quantize(page.transpose(2, 3), 4)).transpose(2, 3)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("site", "key_axis"), [(1, "channel"), (0, "token")])
def test_scales_per_token_and_group_of_channels(site, key_axis):
    rows = torch.randn(1, 2, 32, 40)
    codec = RTN(bits=4, key_axis=key_axis).codecs(SHAPE, {})[site]
    back = codec.decode(codec.encode(rows, None), 2)
    for part in (slice(0, 32), slice(32, 40)):
        torch.testing.assert_close(back[..., part], dequantize(*quantize(rows[..., part], 4)))


def test_an_outlier_channel_hurts_keys_per_token_more_than_per_channel():
    """Why keys have their scales per channel (KIVI's observation)."""
    rows = torch.randn(1, 2, 64, 40)
    rows[..., 3] *= 30
    errors = {}
    for axis in ("channel", "token"):
        key, _ = RTN(bits=4, key_axis=axis).codecs(SHAPE, {})
        errors[axis] = float((key.decode(key.encode(rows, None), 2) - rows).square().sum())
    assert errors["channel"] < errors["token"] / 2


def test_a_shared_scale_is_exact_for_constant_channels():
    rows = torch.arange(40.0).expand(1, 2, 32, 40)
    key, _ = RTN(bits=2).codecs(SHAPE, {})
    assert torch.equal(key.decode(key.encode(rows, None), 2), rows)


def test_bits_by_hand():
    # keys: 4 bits and, per page of 32, a 32-bit scale pair per channel; values: 4 bits and two pairs per token and head
    assert RTN(bits=4).bits_per_token(SHAPE, {}) == 2 * (40 * (4 + 1)) + 2 * (40 * 4 + 2 * 32)
    assert RTN(bits=None).bits_per_token(SHAPE, {}) == 8 * SHAPE.token_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, r"bits=5 is not possible\. Use None or one of \(1, 2, 3, 4, 8\)\."),
        ({"key_axis": "head"}, r"key_axis='head' is not possible\. Use 'channel' or 'token'\."),
        ({"bits": True}, r"bits=True is not possible\. Use a whole number\."),
        ({"group": 1.5}, r"group=1\.5 is not possible\. Use a whole number\."),
        ({"group": 0}, r"group=0 is not possible\. Use at least 1 channel\."),
        ({"window": 0}, r"window=0 is not possible\. Use at least 1 token\."),
        ({"sinks": -1}, r"sinks=-1 is not possible\. Use 0 or more tokens\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = RTN()
    for name, value in settings.items():  # the constructor's own types are checked in tests, so not through it
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{message}$"):
        method.check()
