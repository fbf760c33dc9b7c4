"""SKVQ: the order is a permutation that changes nothing by itself, groups share like ranges, the clip is the best."""

import pytest
import torch

from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._quantiser import SideStats, Space
from kvshrink.methods._stats import KVS, LayerShape
from kvshrink.methods.quant.skvq import BITS, CLIPS, SKVQ, ordered

SHAPE = LayerShape(4, 80, torch.float32)  # 320 channels: groups of 128, 128 and 64
LLAMA = LayerShape(8, 128, torch.float16)
SPACE = Space(4, 80, 32, torch.float32, True)


def mixed(tokens: int, seed: int = 3) -> torch.Tensor:
    """Rows [tokens, 4, 80] of channels of five sizes and means, shuffled over heads."""
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.1, 0.5, 2.0, 8.0, 20.0]).repeat_interleave(64)[torch.randperm(320, generator=g)]
    rows = torch.randn(tokens, 320) * size + size * torch.where(torch.rand(320, generator=g) < 0.5, -1.0, 1.0)
    return rows.unflatten(1, (4, 80))


def side_stats(rows: torch.Tensor) -> SideStats:
    return SideStats(rows, torch.eye(rows.shape[2]).expand(rows.shape[1], -1, -1), torch.ones(rows.shape[:2]), None)


def fit(method: SKVQ, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{kv}_{k}": t for kv in KVS for k, t in method.learn(kv, side_stats(rows), SPACE).items()}


def test_the_order_is_a_permutation_and_puts_like_ranges_together():
    rows = mixed(200).flatten(1)
    order = ordered(rows, 64)
    assert torch.equal(order.sort().values, torch.arange(320))
    spread = rows.amax(0) - rows.amin(0)
    for group in spread[order].split(64):  # five sizes, five groups
        assert group.max() < 2 * group.min()
    assert (spread.split(64)[0].max() > 20 * spread.split(64)[0].min()).all(), "they were mixed"


def test_channels_of_one_range_but_opposite_sign_are_parted():
    """k-means sees minimum and maximum, not their distance alone."""
    rows = torch.rand(100, 256) + torch.where(torch.arange(256) % 2 > 0, 5.0, -6.0)
    order = ordered(rows, 128)
    assert all(len(half.unique()) == 1 for half in (order % 2).split(128))


def test_scores_and_outputs_are_the_same_before_anything_is_rounded():
    rows, query = mixed(160), torch.randn(1, 4, 3, 80)
    learnt = fit(SKVQ(), rows)
    key, value = SKVQ().codecs(SHAPE, learnt)
    x = rows.transpose(0, 1)[None]
    for codec in (key, value):
        assert isinstance(codec, BasisCodec)
        torch.testing.assert_close(codec.smooth(x), x, rtol=1e-5, atol=1e-5)
    weights = torch.softmax(query @ x.transpose(2, 3), -1)
    torch.testing.assert_close(value.expand(weights @ value.project(x), 4), weights @ x, rtol=1e-5, atol=1e-4)


def test_like_ranges_together_lose_less():
    rows = mixed(320)
    learnt, x = fit(SKVQ(), rows), rows.transpose(0, 1)[None]
    plain = {**learnt, **{f"{kv}_order": torch.arange(320)[None].int() for kv in KVS}}
    size = rows.square().mean(0)[None].transpose(0, 1)[None]  # of each channel: all count alike
    for with_order, without in zip(SKVQ().codecs(SHAPE, learnt), SKVQ().codecs(SHAPE, plain), strict=True):
        a, b = (
            ((c.decode(c.encode(x, None), 4) - x).square() / size.transpose(1, 2).reshape(1, 4, 1, 80)).mean()
            for c in (with_order, without)
        )
        assert a < 0.25 * b


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kv", KVS)
def test_the_clip_is_the_best_of_those_tried(kv, bits):
    """By trying all of them through the codec, on rows with long tails, where the range is worth drawing in."""
    rows = torch.randn(128, 4, 80) ** 3
    metric = torch.rand(4, 80) + 0.1
    here = SideStats(rows, torch.diag_embed(metric), torch.ones(rows.shape[:2]), None)
    method = SKVQ(bits=bits)
    learnt = method.learn(kv, here, SPACE)
    x, cost = rows.transpose(0, 1)[None], {}
    for clip in CLIPS:
        tried = {f"{s}_{k}": t for s in KVS for k, t in (learnt | {"clip": torch.tensor(clip)}).items()}
        codec = method.codecs(SHAPE, tried)[KVS.index(kv)]
        cost[clip] = float(((codec.decode(codec.encode(x, None), 4) - x).square() * metric[None, :, None]).sum())
    assert float(learnt["clip"]) == pytest.approx(min(cost, key=cost.__getitem__))
    assert min(cost, key=cost.__getitem__) != 1.0


@pytest.mark.parametrize("mean", [-50.0, 50.0])
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_one_sign_keep_scale_and_minimum_apart(bits, mean):
    """The official code's packed form overwrote minima with scales: rows about 50 came back about their deviation.
    8-bit floats have steps of 1 / 16 at most, which a minimum is off by half of."""
    rows = torch.randn(64, 4, 80) + mean
    for codec in SKVQ(bits=bits).codecs(SHAPE, fit(SKVQ(bits=bits), rows)):
        x = rows.transpose(0, 1)[None]
        back = codec.decode(codec.encode(x, None), 4)
        assert (back - x).abs().mean() < abs(mean) / 16
        assert codec.packing.metadata < set(codec.encode(x, None))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_small_and_large_layers_lose_the_same_share(size):
    """8-bit floats end at 448 and vanish below .001; rows are divided by what they measure on the calibration text."""
    rows = torch.randn(96, 4, 80)
    x = rows.transpose(0, 1)[None] * size
    for codec in SKVQ(bits=4).codecs(SHAPE, fit(SKVQ(bits=4), rows * size)):
        error = (codec.decode(codec.encode(x, None), 4) - x).norm() / x.norm()
        assert error < 0.15


def test_bits_are_the_paper_s():
    """2.125 and 1.925 bits a number (the paper's K2V2 and K2V1.5 with 8-bit scales); 3277 bytes hold 16384 trits."""
    assert SKVQ(bits=2).bits_per_token(LLAMA, {}) / 2048 == 2.125
    assert SKVQ(bits=1.5).bits_per_token(LLAMA, {}) / 2048 == pytest.approx(1.925, abs=1e-3)


def test_three_levels_are_the_minimum_the_middle_and_the_maximum():
    shape = LayerShape(1, 128, torch.float32)
    rows = torch.linspace(-1, 1, 128).expand(64, 1, 128)
    method = SKVQ(bits=1.5)
    here = SideStats(rows, torch.eye(128)[None], torch.ones(rows.shape[:2]), None)
    found = method.learn("value", here, Space(1, 128, 32, torch.float32, True)) | {"clip": torch.tensor(1.0)}
    _, value = method.codecs(shape, {f"{kv}_{k}": t for kv in KVS for k, t in found.items()})
    back = value.decode(value.encode(rows.transpose(0, 1)[None], None), 1)
    torch.testing.assert_close(back.unique(), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-6, rtol=0)
