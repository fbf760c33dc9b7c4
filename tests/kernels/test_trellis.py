"""The trellis code against the published gain over a scalar code, an exhaustive search, and its own levels."""

import itertools

import pytest
import torch

from kvshrink.kernels import native, trellis, trellis_levels
from kvshrink.kernels.normal.reference import expected_error as scalar_error
from kvshrink.kernels.trellis import cpu, reference
from tests.kernels.test_decode_cpu import needs_library

BITS = [1, 2, 3, 4]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
def test_error_is_as_expected_and_near_the_published_one(bits):
    """Marcellin and Fischer (1990): 16 states, open paths, 5.27, 10.78 and 16.40 dB at 1 to 3 bits. A closed path of 32
    tokens has a little less; a scalar code has 4.40, 9.30 and 14.62."""
    x = normal(12_000, 32, 1, seed=bits) if native.library() else normal(1500, 32, 1, seed=bits)
    error = float((trellis.from_codes(trellis.to_codes(x, bits), bits) - x).square().mean())
    assert error == pytest.approx(trellis.expected_error(bits), rel=0.02 if native.library() else 0.05)
    open_path = {1: 5.27, 2: 10.78, 3: 16.40}.get(bits)
    if open_path is not None:
        assert -10 * torch.tensor(trellis.expected_error(bits)).log10() == pytest.approx(open_path, abs=0.1)
    assert trellis.expected_error(bits) < 0.83 * scalar_error(bits)


def test_search_finds_the_best_of_all_closed_paths():
    """All 4^5 codes of a page of 5 tokens at 2 bits."""
    x = normal(40, 5, 1)
    every = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.uint8)[..., None]
    errors = (trellis.from_codes(every, 2)[None] - x[:, None]).square().sum((2, 3))
    for code in [reference, *([cpu] if native.library() else [])]:
        mine = (trellis.from_codes(code.to_codes(x, 2), 2) - x).square().sum((1, 2))
        assert torch.allclose(mine, errors.min(1).values, rtol=1e-5 if code is reference else 1e-3)


@needs_library
def test_pages_of_a_few_tokens_are_searched_by_the_reference():
    """A cost that is clipped would decide there: three times the least error was seen."""
    x = 3 * normal(20, 3, 3, 4)
    assert torch.equal(trellis.to_codes(x, 3), reference.to_codes(x, 3))


@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("page", [8, 16, 31, 32])
def test_kernel_is_as_good_as_the_reference(bits, page):
    """Its costs are integers, and no larger than they must be to tell levels apart: beyond all levels it is coarser."""
    near, far = normal(5, 3, page, 40), 30 * normal(1, 3, page, 40)
    for x, worst, mean in ((near, 0.02, 1e-4), (near[:, :, :, :7], 0.02, 1e-4), (far, 0.1, 0.05)):
        mine, wanted = (
            (trellis.from_codes(code(x, bits), bits) - x).double().square().sum(2)
            for code in (cpu.to_codes, reference.to_codes)
        )
        assert bool((mine <= (1 + worst) * wanted).all())
        assert bool((mine >= (1 - 1e-5) * wanted).all())
        assert mine.sum() <= (1 + mean) * wanted.sum()


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_means_of_what_they_stand_for(bits):
    """Lloyd's condition, and interleaved subsets: a wrong table would still decode, with a larger error."""
    x = normal(4000, 32, 1, seed=7)
    index = trellis_levels.to_indices(trellis.to_codes(x, bits)).flatten().long()
    table = trellis_levels.levels(bits)
    for i in range(len(table)):
        own = x.flatten()[index == i]
        assert float(own.mean()) == pytest.approx(float(table[i]), abs=0.03 + 3 * float(own.std()) / len(own) ** 0.5)


def test_a_page_is_read_by_itself_and_a_channel_too():
    x = normal(2, 32, 6)
    codes = trellis.to_codes(x, 3)
    alone = trellis.to_codes(x[1:, :, 2:3].contiguous(), 3)
    assert torch.equal(alone, codes[1:, :, 2:3])
    changed = codes.clone()
    changed[0, 5, 1] ^= 1
    moved = (trellis.from_codes(changed, 3) != trellis.from_codes(codes, 3)).nonzero()
    assert {tuple(at) for at in moved[:, ::2].tolist()} == {(0, 1)}
    assert set(moved[:, 1].tolist()) <= {5, 6, 7, 9}


def test_nothing_is_fine():
    assert trellis.from_codes(trellis.to_codes(torch.zeros(2, 32, 0), 2), 2).shape == (2, 32, 0)
    assert trellis.from_codes(trellis.to_codes(torch.zeros(0, 32, 3), 2), 2).shape == (0, 32, 3)
