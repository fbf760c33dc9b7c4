"""EdgeQAT's token importance: half of a page's tokens at 8 bits, the others at 4, each by the plain formula."""

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.edgeqat import EdgeQAT

SHAPE = LayerShape(2, 16, torch.float32)


def test_the_half_of_lowest_attention_has_four_bits_and_the_other_eight():
    rows, importance = torch.randn(2, 2, 96, 16) * 3 + 1, torch.rand(2, 2, 96)
    half = importance.unflatten(2, (3, 32)).median(-1, keepdim=True).values  # the lower of the two in the middle
    bits = torch.where(importance.unflatten(2, (3, 32)) > half, 8, 4).flatten(2)[..., None]
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    want = ((rows - low) / scale).round().clamp_min(0).minimum(2**bits - 1) * scale + low
    for codec in EdgeQAT().codecs(SHAPE, {}):
        torch.testing.assert_close(codec.decode(codec.encode(rows, None, importance), 2), want)


def test_bits_by_hand():
    """Six bits a number, 32 bits of scale and minimum for 128 of them, a bit a token and head."""
    shape = LayerShape(8, 128, torch.float16)
    assert EdgeQAT().bits_per_token(shape, {}) == 2 * 8 * (128 * 6 + 32 + 1)
    assert EdgeQAT().budget_values(shape, 4096) == (0.25, 0.5, 0.75)


def test_as_many_bits_for_the_least_of_tokens_are_refused():
    with pytest.raises(SettingError, match=r"^high=4 with low=4 is not possible\. Give important tokens"):
        EdgeQAT(high=4)
    with pytest.raises(SettingError, match=r"^share=0 is not possible"):
        EdgeQAT(share=0)
