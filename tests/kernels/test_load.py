"""The numbers of stored pages in C++ against the reference, bit by bit."""

import pytest
import torch

from kvshrink.errors import CacheError
from kvshrink.kernels.latents import reference
from kvshrink.kernels.load import cpu, load
from kvshrink.kernels.records import recorded
from tests.kernels.samples import FORMS, packed, strewn
from tests.kernels.test_decode_cpu import needs_library

GONE = torch.tensor([[[False, True, True], [False, False, False]], [[False, False, True], [False, True, True]]])


@needs_library
@pytest.mark.parametrize("form", [f for f in FORMS if f != "raw"], ids=str)
@pytest.mark.parametrize("width", [1, 21, 32, 70, 128])
def test_numbers_are_the_reference_s(form, width):
    """Of records as a cache holds them, of tensors, of several lanes, by one thread and by two."""
    pages = packed(form, groups=2, width=width, pages=3, b=2, dtype=torch.float32)
    want = reference.load(pages)
    tensors = pages._replace(stored=dict(pages.stored))
    lanes = pages._replace(stored=recorded(pages.stored, 2))
    for own in (pages, tensors, lanes):
        assert cpu.fits(own)
        assert torch.equal(load(own), want)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = pages._replace(stored={name: t.repeat(200, *[1] * (t.dim() - 1)) for name, t in pages.stored.items()})
        assert torch.equal(load(many), want.repeat(200, 1, 1, 1))
    finally:
        torch.set_num_threads(before)


@needs_library
def test_pages_that_are_too_short_are_refused_and_others_left_to_torch(monkeypatch):
    pages = packed(("token", 4), groups=2, width=32, pages=3, b=2, dtype=torch.float32)
    short = pages._replace(stored={**pages.stored, "codes": pages.stored["codes"][..., :-1]})
    with pytest.raises(CacheError, match="codes of pages"):
        load(short)
    assert not cpu.fits(packed("raw", groups=2, width=32, pages=3, b=2, dtype=torch.float32))
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    assert not cpu.fits(pages)
    assert torch.equal(load(pages), reference.load(pages))


@needs_library
def test_a_page_that_a_lane_does_not_have_is_zeros():
    pages, _ = strewn(*(packed(("token", 4), 2, 32, 3, 2, torch.float32) for _ in range(2)), 2, GONE)
    got = load(pages).unflatten(2, (3, -1))
    there = ~GONE[..., None, None].expand_as(got)
    assert not got[~there].any()
    assert torch.equal(got[there], reference.load(pages).unflatten(2, (3, -1))[there])
