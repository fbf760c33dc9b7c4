"""Runs of several widths: the C++ encoder beside its reference, number by number."""

import pytest
import torch
from test_decode_cpu import needs_library

from kvshrink.errors import DataError
from kvshrink.kernels import mixed, native
from kvshrink.kernels.mixed import cpu, reference
from kvshrink.methods._packing.mixed import Mixed, group_sizes

pytestmark = needs_library
LAYOUTS = [(48, (8, 4, 4)), (52, (4, 3, 2, 1)), (96, (3, 3, 2, 2, 1, 1)), (16, (2,)), (64, (8, 8, 8, 8))]


def pages_of(width: int, pages: int, page: int, far: bool) -> torch.Tensor:
    draw = torch.Generator().manual_seed(width + page)
    found = torch.randn(2, pages, 1, page, width, generator=draw) * torch.rand(2, pages, 1, 1, width, generator=draw)
    if far:
        found[0, 0, 0, 3, ::7] = 9.0
    return found


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("form", ["normal", "trellis"])
@pytest.mark.parametrize(("width", "bits"), LAYOUTS, ids=str)
@pytest.mark.parametrize(("pages", "page"), [(1, 32), (7, 32), (3, 16)])
def test_the_encoder_is_as_good_as_its_reference(width, bits, form, pages, page, far):
    x, sizes = pages_of(width, pages, page, far), group_sizes(width)
    count = torch.full(x.shape[:2], page)
    packing = Mixed(sizes, bits, page, form=form)
    errors, gains = [], []
    for code in (cpu, reference):
        codes, gain = code.encode(x, count.float(), sizes, bits, form)
        assert codes.shape[-1] == packing.page_bytes() - 2 * len(sizes)
        back = packing.load({"codes": codes, "gain": gain}).unflatten(2, (-1, page)).transpose(1, 2)
        errors.append((back - x).double().square().sum((0, 1, 2, 3)))
        gains.append(gain.float())
    torch.testing.assert_close(gains[0], gains[1], rtol=1e-3, atol=0)
    plain = x.square().sum(3).div(page)  # the gains, had nothing been far out
    plain = torch.stack([part.mean(-1) for part in plain.split(sizes, -1)], -1).sqrt()
    assert not far or bits[0] < 3 or bool((gains[0] > 1.05 * plain).any())
    torch.testing.assert_close(errors[0], errors[1], rtol=2e-3, atol=1e-6)


def test_a_page_is_stored_alike_beside_others_and_alone():
    x, sizes = pages_of(52, 9, 32, True), group_sizes(52)
    count = torch.full(x.shape[:2], 32.0)
    whole = cpu.encode(x, count, sizes, (4, 3, 2, 1), "trellis")
    for n in range(9):
        alone = cpu.encode(x[1:, n : n + 1], count[1:, n : n + 1], sizes, (4, 3, 2, 1), "trellis")
        assert all(torch.equal(a[0, 0], w[1, n]) for a, w in zip(alone, whole, strict=True))


def test_zeros_and_numbers_that_are_none():
    packing = Mixed((16, 4), (3, 8), 32, form="trellis")
    zeros = torch.zeros(1, 1, 64, 20)
    assert torch.equal(packing.load(packing.store(zeros, None)), zeros)
    for bad in (float("nan"), float("inf"), 1e30):
        with pytest.raises(DataError, match="NaN, infinite"):
            packing.store(zeros.index_fill(2, torch.tensor([5]), bad), None)


def test_the_encoder_is_left_out_where_no_kernel_is_wanted(monkeypatch):
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    monkeypatch.setattr(native, "library", lambda: pytest.fail("asked for the library"))
    for form, bits in (("normal", 8), ("trellis", 4)):
        mixed.encode(torch.randn(1, 1, 1, 32, 16), torch.full((1, 1), 32.0), (16,), (bits,), form)
