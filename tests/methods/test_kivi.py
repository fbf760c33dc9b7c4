import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.kivi import KIVI
from tests.cache.build import feed, make

SHAPE = LayerShape(2, 64, torch.float32)


def rounded(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The paper's formula on the last axis: z = min, s = (max - min) / (2^B - 1), x' = round((x - z) / s) s + z."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((groups - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_per_channel_values_per_token_in_groups_of_32_after_a_stream_of_tokens(bits):
    """What the cache holds after 300 single tokens is each group quantised once, and the rest exact."""
    cache = make(KIVI(bits=bits), SHAPE, [{}])
    rows = torch.randn(2, 1, 2, 300, 64) * torch.rand(64) + 3
    for t in range(300):
        ((keys, values),) = feed(cache, [rows[0, :, :, t : t + 1]], [rows[1, :, :, t : t + 1]])
    layer = cache.layers[0]
    stored, body = layer.pages.tensors(), 300 - keys.shape[2]
    assert body % 32 == 0
    assert body > 100
    assert stored
    for codec, prefix, exact, x in zip(layer.codecs, ("k.", "v."), (keys, values), rows, strict=True):
        assert torch.equal(exact, x[:, :, body:])
        got = codec.decode(layer.pages.records().under(prefix), 2)
        by_channel = x[:, :, :body].transpose(2, 3)  # groups of 32 tokens of one channel
        groups = (by_channel if prefix == "k." else x[:, :, :body]).unflatten(-1, (-1, 32))
        want = rounded(groups, bits).flatten(-2)
        torch.testing.assert_close(got, want.transpose(2, 3) if prefix == "k." else want)


def test_the_last_128_tokens_are_exact_and_none_of_the_first():
    cache = make(KIVI(), SHAPE, [{}])
    for tokens in (500, *[1] * 70):
        rows = torch.randn(1, 2, tokens, 64)
        feed(cache, [rows], [rows.clone()])
        assert 128 <= cache.layers[0].window.count <= 160
    assert cache.layers[0].sinks.columns is None


@pytest.mark.parametrize(("bits", "each"), [(2, 3), (4, 5)])
def test_bits_by_hand(bits, each):
    """A float16 scale and minimum for 32 numbers are one bit for each of them."""
    assert KIVI(bits=bits).bits_per_token(SHAPE, {}) == 2 * 128 * each
    assert KIVI(bits=bits).budget_values(SHAPE, 4096) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"bits=3 is not possible\. Use one of 2, 4\."),
        ({"bits": None}, r"bits=None is not possible\. Use a whole number\."),
        ({"bits": 2.0}, r"bits=2\.0 is not possible\. Use a whole number\."),
        ({"window": 0}, r"window=0 is not possible\. Use at least 1 token\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = KIVI()
    for name, value in settings.items():  # the constructor's own types are checked in tests, so not through it
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{message}$"):
        method.check()


@pytest.mark.parametrize("group", [64, 128])
def test_larger_groups_are_larger_pages(group):
    method = KIVI(group=group)
    assert method.page == group
    key, value = method.codecs(SHAPE, {})
    rows = torch.randn(1, 2, 2 * group, 64)
    want = rounded(rows.transpose(2, 3).unflatten(-1, (-1, group)), 2).flatten(-2).transpose(2, 3)
    torch.testing.assert_close(key.decode(key.encode(rows, None), 2), want)
    want = rounded(rows.unflatten(-1, (-1, min(group, 64))), 2).flatten(-2)
    torch.testing.assert_close(value.decode(value.encode(rows, None), 2), want)
    assert method.bits_per_token(SHAPE, {}) == 128 * (2 + 32 / group) + 128 * (2 + 32 / 64)
