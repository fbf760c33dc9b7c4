import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._budgets import Shared
from kvshrink.methods.evict.adakv import AdaKV
from tests.methods.evicting import SHAPE, Steps, wanted


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_heads_share_a_layers_budget(floor):
    importance = torch.randn(3, 4, 320).exp() * torch.tensor([1.0, 3.0, 0.1, 1.0])[:, None]
    got = Shared(0.25, None, floor).counts(importance, torch.tensor([10, 10, 10]), 32)
    for row in range(3):
        want = wanted(importance[row].double().numpy(), 0.25, floor, 32)
        assert (got[row].numpy() == want * 32).all()
        assert got[row].sum() == 4 * 3 * 32
    assert floor == 1.0 or len(got.unique()) > 1, "unequal counts"
    assert int(got.min()) >= int(floor * 3) * 32


def test_each_head_keeps_its_most_important_tokens():
    steps = Steps(AdaKV(ratio=0.3))
    steps.step(600)
    steps.check()
    assert any(len(a) != len(b) for a, b in steps.kept())


def test_a_short_head_pays_for_nothing_of_a_long_one_but_nine_bytes_a_page():
    """Bytes held are those promised, however unlike the heads are, and where the pages of the longest one are."""
    method = AdaKV(ratio=0.3, bits=4)
    steps = Steps(method)
    steps.step(600)
    steps.step(1)
    layer = steps.cache.compressed[0]
    assert not layer.body.ages[0].kept.even
    kept = layer.body.ages[0].kept
    wide = 9 * kept.counts.size * len(kept)
    assert layer.held().total == method.layer_bytes(SHAPE, {}, 601, 2) + wide


def test_settings():
    with pytest.raises(SettingError):
        AdaKV(floor=1.5)
