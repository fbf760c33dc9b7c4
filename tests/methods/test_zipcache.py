"""ZipCache: pages against the paper's formulas, a class at a time; its bytes by hand; what separated channels gain."""

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.kernels.pack import unpack
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.zipcache import ZipCache

SHAPE = LayerShape(2, 16, torch.float32)
PAGE, HIGH = 128, 80


def codes(group: torch.Tensor, bits: int) -> torch.Tensor:
    """A group's affine codes, read again."""
    low, scale = group.min().half().float(), ((group.max() - group.min()) / (2**bits - 1)).half().float()
    return ((group - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def test_a_page_by_the_paper_s_formulas():
    """Keys: a channel's numbers of one class. Values: over c = sqrt(max |v|) of the page, a token's channels."""
    rows, importance = torch.randn(2, 2, 2 * PAGE, 16) * torch.rand(16).mul(4).exp() + 1, torch.rand(2, 2, 2 * PAGE)
    best = importance.unflatten(2, (2, PAGE)).argsort(-1, descending=True)
    for codec, kv in zip(ZipCache().codecs(SHAPE, {}), ("key", "value"), strict=True):
        assert codec.needs_importance
        stored = codec.encode(rows, None, importance)
        got = codec.decode(stored, 2).unflatten(2, (2, PAGE))
        chosen = unpack(stored["mask"].transpose(1, 2), 1).bool()
        for i, h, p in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
            page = rows[i, h, p * PAGE : (p + 1) * PAGE]
            high, low = best[i, h, p, :HIGH], best[i, h, p, HIGH:]
            assert sorted(high.tolist()) == chosen[i, h, p].nonzero().flatten().tolist()
            c = page.abs().amax(0).sqrt().half().float()
            for at, bits in ((high, 4), (low, 2)):
                if kv == "key":
                    want = torch.stack([codes(channel, bits) for channel in page[at].T]).T
                else:
                    want = torch.stack([codes(token, bits) for token in page[at] / c]) * c
                torch.testing.assert_close(got[i, h, p, at], want)


def test_a_page_s_bytes_by_hand():
    """80 tokens of 4 bits and 48 of 2, a bit each; keys a scale and a minimum for each channel and class, values for
    each token, and c for each channel."""
    shape = LayerShape(8, 128, torch.float16)
    payload = (80 * 4 + 48 * 2) * 128 // 8 + 128 // 8
    key, value = payload + 2 * 128 * 4, payload + 128 * 4 + 128 * 2
    assert [codec.page_bytes() for codec in ZipCache().codecs(shape, {})] == [8 * key, 8 * value]
    assert ZipCache().bits_per_token(shape, {}) == 8 * (key + value) * 8 / 128


@pytest.mark.parametrize("kv", [0, 1])
def test_more_of_the_tokens_at_high_bits_lose_less(kv):
    rows, errors = torch.randn(1, 2, 4 * PAGE, 16) * torch.rand(16), []
    shares = ZipCache().budget_values(SHAPE, 4096)
    assert len(shares) == 15
    bits = [ZipCache(share=share).bits_per_token(SHAPE, {}) for share in shares]
    assert bits == sorted(set(bits)), "the fewest bytes first"
    for share in shares[:: len(shares) // 3]:
        codec = ZipCache(share=share).codecs(SHAPE, {})[kv]
        errors.append(float((codec.decode(codec.encode(rows, None), 2) - rows).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_values_with_outlier_channels_come_back_better_than_without_separation():
    """Four bits for a token's range, of which one channel takes nearly all."""
    shape, rows = LayerShape(1, 64, torch.float32), torch.randn(1, 1, PAGE, 64)
    rows[..., 9] *= 50
    _, value = ZipCache().codecs(shape, {})
    plain, separated = value.packing.inner, value.packing
    errors = [(x.load(x.store(rows, None)) - rows)[..., :9].square().mean() for x in (plain, separated)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": 2}, r"high=2 with low=2 is not possible\. Give important tokens more bits\."),
        ({"low": 5}, r"low=5 is not possible\. Use one of 8, 4, 3, 2, 1\."),
        ({"share": 1.0}, r"share=1\.0 is not possible\. Use a share of tokens above 0 and below 1\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        ZipCache(**settings)
