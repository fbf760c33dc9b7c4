"""KVQuant: fitted tables are Lloyd's, outliers come back, Q-Norm restores mean and deviation, keys keep no scale."""

import pytest
import torch

from kvshrink.errors import DataError
from kvshrink.kernels.normal.reference import levels
from kvshrink.methods._packing import Codebook
from kvshrink.methods._packing.sparse import Sparse
from kvshrink.methods._quantiser import SideStats, Space
from kvshrink.methods._stats import KVS, LayerShape
from kvshrink.methods.quant._tables import fitted, normed
from kvshrink.methods.quant.kvquant import KVQuant

SHAPE = LayerShape(2, 64, torch.float32)
LLAMA = LayerShape(8, 128, torch.float16)


def side_stats(keys: torch.Tensor, weight: torch.Tensor | None = None) -> SideStats:
    """Rows [m, G, r] whose channels cost `weight` [G, r]."""
    cost = torch.ones(keys.shape[1:]) if weight is None else weight
    return SideStats(keys, torch.diag_embed(cost), torch.ones(keys.shape[:2]), None)


def space(rows: torch.Tensor) -> Space:
    return Space(rows.shape[1], rows.shape[2], 32, torch.float32, True)


def cells(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest level of each number, by looking at all."""
    return (x[:, None] - table).abs().argmin(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_numbers_of_equal_weight_get_lloyd_max_levels(bits):
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).float()
    x = x[torch.randperm(len(x))]
    near = 5e-3 + float(levels(bits).max()) / 254  # ours are in whole units
    torch.testing.assert_close(fitted(x, torch.ones_like(x), 2**bits), levels(bits).float(), atol=near, rtol=0)


def test_every_level_is_the_weighted_mean_of_its_cell():
    x, w = torch.randn(5000).exp(), torch.rand(5000)
    table = fitted(x, w, 8)
    where = cells(x, table)
    for i, level in enumerate(table):
        mine = where == i
        torch.testing.assert_close(level, (x * w)[mine].sum() / w[mine].sum(), atol=1e-3, rtol=1e-3)
    assert (table.diff() > 0).all()


def test_weights_pull_levels():
    x = torch.linspace(-1, 1, 1001)
    heavy = torch.where(x > 0.5, 1000.0, 1.0)
    assert (fitted(x, heavy, 8) > 0.5).sum() > (fitted(x, torch.ones_like(x), 8) > 0.5).sum()


def test_q_norm_restores_mean_and_deviation():
    x = torch.randn(4000) ** 3 + 2
    table = fitted(x, torch.ones_like(x), 4)
    codes = cells(x, table)
    plain, back = table[codes], normed(table, x)[codes]
    assert plain.std() < 0.98 * x.std(), "k-means alone must lose deviation, else there is nothing to restore"
    torch.testing.assert_close(back.mean(), x.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(back.std(), x.std(), rtol=1e-4, atol=0)


def test_two_bit_keys_have_the_calibration_s_mean_and_deviation(stats_of):
    """Through the whole codec, without outliers: what is decoded is as wide as what went in."""
    stats = stats_of(SHAPE)
    rows = stats.sample.keys_pre_rope[:288].transpose(0, 1)[None]
    key, _ = KVQuant(bits=2, outliers=0.0).codecs(SHAPE, KVQuant(bits=2, outliers=0.0).fit_layer(stats))
    unit, back = key.project(rows), key.packing.load(key.encode(rows, None))
    torch.testing.assert_close(back.std(), unit.std(), rtol=0.02, atol=0)
    torch.testing.assert_close(back.mean(), unit.mean(), rtol=0, atol=0.02)


def test_keys_are_normalised_by_quantiles_of_each_channel():
    """Channel c holds 0 .. 200 times c + 1, and two wild numbers that 1 % of outliers leave out."""
    rows = torch.arange(201.0)[torch.randperm(201), None, None] * torch.arange(1.0, 9.0)
    wild = torch.cat([rows, rows.new_full((1, 1, 8), 1e4), rows.new_full((1, 1, 8), -1e4)])
    learnt = KVQuant(bits=4).learn("key", side_stats(wild), space(wild))
    scale = torch.arange(1.0, 9.0)[None]
    torch.testing.assert_close(learnt["middle"], 100 * scale)
    torch.testing.assert_close(learnt["range"], 100 * scale)
    assert learnt["levels"].abs().max() < 1


def test_a_key_table_is_fitted_by_what_errors_cost():
    """Two channels of different distributions: the table is that of the one that alone costs something."""
    rows = torch.stack([torch.rand(400) * 2 - 1, torch.randn(400) ** 3], 1)[:, None]
    learnt = KVQuant(bits=2, outliers=0.0).learn("key", side_stats(rows, torch.tensor([[1.0, 0.0]])), space(rows))
    unit = (rows[:, 0, 0] - learnt["middle"][0, 0]) / learnt["range"][0, 0]
    torch.testing.assert_close(learnt["levels"], fitted(unit, torch.ones_like(unit), 4), atol=0.05, rtol=0)
    alike = KVQuant(bits=2, outliers=0.0).learn("key", side_stats(rows), space(rows))["levels"]
    assert (alike - learnt["levels"]).abs().max() > 0.1


def test_a_channel_of_a_wide_range_counts_by_its_square():
    """Of two channels that cost alike, the one that is scaled back by a thousand decides."""
    rows = torch.stack([torch.rand(400) * 2 - 1, torch.randn(400) ** 3 * 1000], 1)[:, None]
    method = KVQuant(bits=2, outliers=0.0)
    both = method.learn("key", side_stats(rows), space(rows))["levels"]
    alone = method.learn("key", side_stats(rows, torch.tensor([[0.0, 1.0]])), space(rows))["levels"]
    torch.testing.assert_close(both, alone, atol=0.05, rtol=0)
    assert (both - torch.tensor([-0.75, -0.25, 0.25, 0.75])).abs().max() > 0.1


def test_a_value_table_is_fitted_to_what_outliers_leave():
    """Uniform numbers and a wild one in each token: four levels are a quarter of the range each."""
    rows = torch.rand(300, 2, 64) * 2 - 1
    rows[:, :, 9] = 500.0
    learnt = KVQuant(bits=2, outliers=0.02).learn("value", side_stats(rows), space(rows))
    torch.testing.assert_close(learnt["levels"], torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=0.05, rtol=0)


def test_the_numbers_farthest_out_come_back_to_float16(stats_of):
    method = KVQuant(bits=2)
    for codec in method.codecs(SHAPE, method.fit_layer(stats_of(SHAPE))):
        rows = torch.randn(1, 2, 64, 64)
        rows[:, :, 5, 7] = 900.0
        rows[:, :, 40, 9] = -1100.0
        back = codec.decode(codec.encode(rows, None), 2)
        for at in ((5, 7), (40, 9)):
            torch.testing.assert_close(back[:, :, *at], rows[:, :, *at], rtol=2e-3, atol=0)


def test_bytes_of_a_llama_layer_by_hand():
    """Keys: codes and 41 outliers of 4096 numbers, 4 bytes each. Values: codes, two float16 and one outlier a token."""
    for bits in (2, 3, 4):
        key = 8 * (32 * 128 * bits // 8 + 41 * 4)
        value = 8 * (32 * 128 * bits // 8 + 32 * (4 + 3))
        assert KVQuant(bits=bits).bits_per_token(LLAMA, {}) == (key + value) * 8 / 32


def test_keys_store_no_scale_and_refuse_what_is_not_finite(stats_of):
    method = KVQuant(outliers=0.0)
    key, _ = method.codecs(SHAPE, method.fit_layer(stats_of(SHAPE)))
    assert set(key.encode(torch.randn(1, 2, 32, 64), None)) == {"codes"}
    for packing in (key.packing, Sparse(key.packing, "page", 3, "large")):
        assert isinstance(key.packing, Codebook)
        rows = torch.randn(1, 2, 32, 64)
        rows[0, 1, 3, 3] = float("nan")
        with pytest.raises(DataError):
            packing.store(rows, None)


def test_more_bits_and_outliers_lose_less(stats_of):
    stats = stats_of(SHAPE)
    rows = torch.randn(1, 2, 96, 64) ** 3
    errors = {}
    for bits in (2, 3, 4):
        for share in (0.0, 0.01):
            method = KVQuant(bits=bits, outliers=share)
            pair = method.codecs(SHAPE, method.fit_layer(stats))
            errors[bits, share] = [float((c.decode(c.encode(rows, None), 2) - rows).square().mean()) for c in pair]
    for kv in range(len(KVS)):
        assert errors[4, 0.01][kv] < errors[3, 0.01][kv] < errors[2, 0.01][kv]
        assert errors[3, 0.01][kv] < errors[3, 0.0][kv]
