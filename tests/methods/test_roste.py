import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.roste import RoSTE

SHAPE = LayerShape(1, 16, torch.float32)


def fitted(stats_of, keys: torch.Tensor) -> dict:
    return RoSTE().fit_layer(stats_of(SHAPE, keys, pairs=None))


def test_a_side_is_rotated_where_that_loses_less_and_only_there(stats_of):
    outlier = torch.randn(320, 16)
    outlier[:, 3] *= 50
    assert bool(fitted(stats_of, outlier)["key_rotated"])
    # every row lies on the 16 levels of its own grid: nothing is lost as it is
    grid = torch.stack([torch.randperm(16) for _ in range(320)]).float()
    stats = stats_of(SHAPE, grid, grid)
    assert not bool(RoSTE().fit_layer(stats)["value_rotated"])


def test_codecs_do_what_was_chosen():
    rows = torch.stack([torch.randperm(16) for _ in range(32)]).float()[None, None]
    flags = {"key_rotated": torch.tensor(True), "value_rotated": torch.tensor(False)}
    key, value = RoSTE().codecs(SHAPE, flags)
    assert torch.equal(value.decode(value.encode(rows, None), 1), rows)
    assert not torch.equal(key.decode(key.encode(rows, None), 1), rows)
    torch.testing.assert_close(key.decode(key.encode(rows, None), 1), rows, rtol=0, atol=4.0)
