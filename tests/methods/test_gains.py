"""Gains where a token is far out: what would be cut, what that costs, and that nothing else changes."""

import pytest
import torch

from kvshrink.kernels.groups import FACTORS, widened
from kvshrink.kernels.latents import level_table
from kvshrink.methods._packing.mixed import Mixed


def rows(far: float, channels: int = 16) -> torch.Tensor:
    """Two pages; token 7 of the second is `far` deviations out in one channel."""
    found = torch.randn(1, 1, 64, channels, generator=torch.Generator().manual_seed(0))
    found[0, 0, 39, 3] = far
    return found


def error(packing: Mixed, x: torch.Tensor, valid=None) -> torch.Tensor:
    return (packing.load(packing.store(x, valid)) - x).square()


@pytest.mark.parametrize("form", ["normal", "trellis"])
@pytest.mark.parametrize(("bits", "own", "rest"), [(8, 0.01, 0.002), (4, 12, 0.08)])
def test_a_word_that_is_far_out_is_read_where_it_is(form, bits, own, rest):
    """As the commonest words of a real model are after a rotation; ten deviations out here. Cut at the largest level
    it would be off by five to seven; the others of its page stay about as they were."""
    found = error(Mixed((16,), (bits,), 32, form=form), rows(10.0))
    assert found[0, 0, 39, 3] < own
    assert found[0, 0, 32:].mean() < rest
    most = float(level_table(form)[bits].abs().max())
    own = rows(10.0)[0, 0, 32:]
    assert (10 - most * own.square().mean().sqrt()) ** 2 > 20, "or nothing would have been cut"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_pages_without_such_a_token_keep_their_gain(bits):
    x = rows(1.0).clamp(-2.5, 2.5)
    pages = x.unflatten(2, (2, 32))
    stored = Mixed((16,), (bits,), 32).store(x, None)
    torch.testing.assert_close(
        stored["gain"][0, :, 0, 0].float(), pages.square().mean((0, 1, 3, 4)).sqrt(), rtol=1e-3, atol=0
    )


def test_the_gain_is_the_one_of_least_cost_by_hand():
    """One number of 6 beside 511 of 1 (in size), levels up to 2 and an error of .01 at a gain of 1."""
    pages = torch.ones(1, 1, 1, 32, 16)
    pages[..., 5, 5] = -6.0
    gain = torch.ones(1, 1, 1, 1)
    cost = {k: 3 * max(0.0, 6 - 2 * k) ** 2 + 512 * 0.01 * k * k for k in FACTORS}
    found = widened(pages, gain, (torch.tensor([2.0]), torch.tensor([0.01])), (16,))
    assert float(found) == pytest.approx(min(cost, key=cost.__getitem__))
    assert float(found) > 1
    fine = widened(pages, gain, (torch.tensor([2.0]), torch.tensor([0.019])), (16,))
    assert float(fine) > float(widened(pages, gain, (torch.tensor([2.0]), torch.tensor([0.021])), (16,)))
    dear = widened(pages, gain, (torch.tensor([2.0]), torch.tensor([1.0])), (16,))
    assert float(dear) == 1, "where levels are coarse, one token is not worth it"


def test_a_smaller_last_group_and_pads_stay_out_of_it():
    packing = Mixed((16, 4), (4, 8), 32)
    x = rows(1.0, 20)
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[0, 0] = False
    loud = x.clone()
    loud[0, 0, 0] = 1e4
    for name, tensor in packing.store(loud, valid).items():
        assert torch.equal(tensor, packing.store(x, valid)[name]), name
    x[0, 0, 40, 18] = 30.0
    assert error(packing, x)[0, 0, 40, 18] < 0.1
