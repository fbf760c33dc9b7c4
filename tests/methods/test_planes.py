"""Nested planes: dropping them is a shift of the codes, and a code reads as the middle of the numbers that share it."""

from dataclasses import replace

import pytest
import torch

from kvshrink.methods._packing import Affine, Planes


def codes_of(rows: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit codes, scale and low of one page, in plain arithmetic: groups along the axis."""
    low, high = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
    scale, low = ((high - low) / 255).half().float(), low.half().float()
    return ((rows - low) / scale).round().clamp(0, 255).int(), scale, low


@pytest.mark.parametrize(("axis", "along"), [("channel", 2), ("token", 3)])
@pytest.mark.parametrize("bits", [4, 2])
def test_a_demoted_page_is_the_8_bit_code_shifted(axis, along, bits):
    rows = torch.randn(2, 3, 32, 20) * 4 + 3
    young, old = (Planes(3, 20, 32, b, axis, 20) for b in (8, bits))
    stored = old.truncate(young.store(rows, None))
    codes, scale, low = codes_of(rows, along)
    spare = 8 - bits
    members = torch.arange(2**spare).float()  # what the dropped bits may have been
    middle = (codes >> spare).float() * 2**spare + members.mean()
    torch.testing.assert_close(old.load(stored), middle * scale + low, rtol=1e-6, atol=1e-5)
    assert sum(t.nbytes for t in stored.values()) == 2 * old.page_bytes()
    assert all(torch.equal(t, old.store(rows, None)[k]) for k, t in stored.items()), "as if stored so at once"


def test_two_steps_down_equal_one():
    rows = torch.randn(1, 2, 64, 8)
    eight, four, two = (Planes(2, 8, 32, b, "channel") for b in (8, 4, 2))
    slow, fast = two.truncate(four.truncate(eight.store(rows, None))), two.truncate(eight.store(rows, None))
    assert slow.keys() == fast.keys()
    assert all(torch.equal(slow[k], fast[k]) for k in fast)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_all_planes_are_the_plain_8_bit_code(axis):
    rows = torch.randn(2, 2, 64, 12) * 3
    plain, nested = Affine(2, 12, 32, 8, axis, 8), Planes(2, 12, 32, 8, axis, 8)
    assert torch.equal(plain.load(plain.store(rows, None)), nested.load(nested.store(rows, None)))
    assert plain.page_bytes() == nested.page_bytes()


def test_the_error_is_at_most_half_a_step_of_what_is_left():
    rows = torch.rand(1, 1, 320, 16)
    eight = Planes(1, 16, 32, 8, "token", 16)
    stored = eight.store(rows, None)
    step = stored["scale"].float().max()
    for bits, worst in ((8, 0.5), (4, 8.1), (2, 32.1)):
        old = replace(eight, bits=bits)
        error = (old.load(old.truncate(stored)) - rows).abs().max()
        assert worst / 2 < error / step < worst, bits


def test_a_constant_group_comes_back_at_every_age():
    rows = torch.full((1, 1, 32, 8), 5.0)
    eight = Planes(1, 8, 32, 8, "channel")
    for bits in (8, 4, 2):
        old = replace(eight, bits=bits)
        assert torch.equal(old.load(old.truncate(eight.store(rows, None))), rows)
