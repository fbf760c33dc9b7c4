"""GEAR: each part loses less than without it, bytes by hand, and what the official code got wrong."""

from itertools import pairwise

import pytest
import torch
from jaxtyping import TypeCheckError

from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.gear import GEAR

SHAPE = LayerShape(2, 64, torch.float32)
LLAMA = LayerShape(8, 128, torch.float16)


def back(method: GEAR, rows: torch.Tensor, shape: LayerShape = SHAPE) -> list[torch.Tensor]:
    """Rows as keys and as values, stored and read again."""
    return [c.decode(c.encode(rows, None), shape.heads) for c in method.codecs(shape, {})]


def errors(method: GEAR, rows: torch.Tensor) -> list[float]:
    return [float((x - rows).square().sum()) for x in back(method, rows)]


def rows_with_structure(tokens: int = 256) -> torch.Tensor:
    """Rows of a few shared directions, noise, and a number of a hundred in five hundred."""
    rows = torch.randn(1, 2, tokens, 3) @ torch.randn(3, 64) + torch.randn(1, 2, tokens, 64)
    return torch.where(torch.rand(rows.shape) < 0.002, 100.0, rows)


def test_bits_of_a_llama_layer_by_hand():
    """Codes 2; scales .5; one outlier at each end of 128 numbers, 3 bytes each, .375; rank 3 of 128 + 128, .75."""
    assert GEAR().bits_per_token(LLAMA, {}) == 2048 * (2 + 0.5 + 0.375 + 0.75)
    assert GEAR(outliers=0.0).bits_per_token(LLAMA, {}) == 2048 * 3.25
    assert GEAR(outliers=0.0, rank=0).bits_per_token(LLAMA, {}) == 2048 * 2.5
    assert GEAR(outliers=0.0, rank=0, base="kcvt").bits_per_token(LLAMA, {}) == 2048 * 2.25


@pytest.mark.parametrize("base", ["kivi", "kcvt"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_part_takes_from_the_error(base, bits):
    rows = rows_with_structure()
    found = {
        (rank, share): errors(GEAR(bits=bits, rank=rank, outliers=share, base=base), rows)
        for rank in (0, 3)
        for share in (0.0, 0.04)
    }
    for kv in (0, 1):
        assert found[3, 0.04][kv] < found[0, 0.04][kv] < 0.5 * found[0, 0.0][kv]
        assert found[3, 0.0][kv] < found[0, 0.0][kv]


def test_a_higher_rank_never_loses_more():
    rows = rows_with_structure()
    by_rank = [errors(GEAR(rank=rank, outliers=0.0), rows) for rank in (0, 1, 2, 4, 8, 64)]
    for worse, better in pairwise(by_rank):
        assert all(b < w for b, w in zip(better, worse, strict=True))
    assert all(e < 1e-4 * w for e, w in zip(by_rank[-1], by_rank[0], strict=True)), "all of an error is of full rank"


@pytest.mark.parametrize("rank", [0, 3])
def test_outliers_come_back_to_float16_whatever_the_low_rank_error_says(rank):
    """A key channel's extremes over a page, a value token's over its channels."""
    rows = torch.randn(1, 2, 128, 64)
    keys, values = back(GEAR(rank=rank, outliers=0.04), rows)
    for got, axis in ((keys, 2), (values, 3)):
        for at in (rows.argmax(axis, keepdim=True), rows.argmin(axis, keepdim=True)):
            assert torch.equal(got.gather(axis, at), rows.gather(axis, at).half().float())


def test_keys_have_a_scale_for_64_tokens():
    """A page whose second half is ten times the first: the first must not pay for it."""
    rows = torch.randn(1, 2, 128, 64)
    rows[:, :, 64:] *= 10
    near = [
        (back(GEAR(rank=0, outliers=0.0, base=base), rows)[0] - rows)[:, :, :64].norm() for base in ("kivi", "kcvt")
    ]
    assert near[0] < 0.3 * near[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_have_all_their_levels(bits):
    """The official code's b^2 - 1 steps are 8 at 3 bits, where there are 7."""
    rows = torch.linspace(-1, 1, 64).expand(1, 2, 128, 64) * torch.ones(128)[:, None]
    values = back(GEAR(bits=bits, rank=0, outliers=0.0), rows)[1]
    assert len(values[0, 0, 0].unique()) == 2**bits
    assert (values - rows).abs().max() < 1.01 / (2**bits - 1)


@pytest.mark.parametrize("base", ["kivi", "kcvt"])
@pytest.mark.parametrize("constant", [0.0, 3.0, -700.0])
def test_constant_rows_come_back(base, constant):
    """The official code divided by their range, 0."""
    rows = torch.full((1, 2, 128, 64), constant)
    for got in back(GEAR(base=base), rows):
        assert torch.equal(got, rows)


def test_settings_that_no_page_has_are_refused():
    for settings in ({"rank": 129}, {"rank": -1}, {"outliers": 0.6}, {"base": "int4"}, {"bits": 8}):
        with pytest.raises((SettingError, TypeCheckError)):  # in tests the annotation of `base` is checked first
            GEAR(**settings)
