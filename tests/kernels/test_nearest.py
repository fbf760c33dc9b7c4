"""The nearest of a few levels in C++ against the reference, code by code."""

import pytest
import torch

from kvshrink.kernels.nearest import cpu, nearest, reference
from tests.kernels.test_decode_cpu import needs_library


@needs_library
@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 5, 64), (0, 4), (600, 600)])
def test_codes_are_the_reference_s(count, shape):
    """Ties, infinities and what is no number among them; rows that do not lie side by side; two threads."""
    levels = torch.linspace(-1, 1, count).pow(3)
    x = torch.randn(shape)
    flat = x.view(-1)
    borders = (levels[1:] + levels[:-1]) / 2
    flat[: min(len(borders), len(flat))] = borders[: len(flat)]
    if len(flat) > 40:
        flat[-3:] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for own in (x, x.transpose(0, -1)):
                want = reference.nearest(own, levels)
                assert torch.equal(cpu.nearest(own, levels), want)
                assert torch.equal(nearest(own, levels), want)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_float32_or_has_many_levels_goes_to_torch(monkeypatch):
    monkeypatch.setattr(cpu, "nearest", None)
    levels = torch.linspace(-1, 1, 256)
    x = torch.randn(5, 7)
    assert torch.equal(nearest(x, levels), reference.nearest(x, levels))
    assert torch.equal(nearest(x.double(), levels[::32].double()), reference.nearest(x.double(), levels[::32].double()))
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    assert nearest(x, levels[::32]).dtype == torch.uint8
