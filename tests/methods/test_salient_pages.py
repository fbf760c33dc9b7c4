"""Pages of two classes of tokens, and channels divided by the root of their largest number, by hand."""

import pytest
import torch

from kvshrink.errors import DataError
from kvshrink.kernels.pack import unpack
from kvshrink.methods._packing import Affine, Raw, Salient, Separable
from kvshrink.methods._packing.salient import counted

G, R, PAGE, HIGH = 2, 5, 32, 8


def salient(high: int | None = 8, low: int | None = 1, axis: str = "token") -> Salient:
    forms = [
        Raw(1, R, count, torch.float32) if bits is None else Affine(1, R, count, bits, axis, R)
        for bits, count in ((high, HIGH), (low, PAGE - HIGH))
    ]
    return Salient(G, R, *forms)


def masks(stored) -> torch.Tensor:
    """Which tokens have more bits, bool [b, G, t]."""
    return unpack(stored["mask"].transpose(1, 2), 1).flatten(2).bool()


def formula(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """A group's plain affine codes, read again: x' = round((x - min) / s) s + min, s = (max - min) / (2^bits - 1)."""
    low = numbers.min().half().float()
    scale = ((numbers.max() - numbers.min()) / (2**bits - 1)).half().float()
    return ((numbers - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def test_the_tokens_worth_most_of_each_page_and_group_are_those_of_more_bits():
    importance = torch.rand(3, G, 4 * PAGE)
    chosen = masks(salient().store(torch.randn(3, G, 4 * PAGE, R), None, importance))
    for i in range(3):
        for g in range(G):
            for page in range(4):
                part = slice(page * PAGE, (page + 1) * PAGE)
                best = sorted(range(PAGE), key=lambda at, v=importance[i, g, part]: -float(v[at]))[:HIGH]
                assert chosen[i, g, part].nonzero().flatten().tolist() == sorted(best)


def test_groups_of_several_heads_choose_by_the_mean_and_of_equals_the_earlier_come_first():
    importance = torch.zeros(1, 3 * G, PAGE)
    importance[0, :3, 20] = torch.tensor([0.0, 0.0, 3.0])
    importance[0, :3, 21] = torch.tensor([0.9, 0.9, 0.9])
    importance[0, 3, 9] = 1.0
    chosen = masks(salient().store(torch.randn(1, G, PAGE, R), None, importance))[0]
    assert chosen[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 20, 21]
    assert chosen[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 9]


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(("high", "low"), [(4, 2), (8, 3), (None, 1)])
def test_each_token_is_what_its_class_s_formula_says(axis, high, low):
    rows, importance = torch.randn(2, G, 3 * PAGE, R) * torch.rand(R) * 10 + 1, torch.rand(2, G, 3 * PAGE)
    packing = salient(high, low, axis)
    stored = packing.store(rows, None, importance)
    got, chosen = packing.load(stored), masks(stored)
    assert sum(t.nbytes for t in stored.values()) == 2 * 3 * packing.page_bytes()
    for i in range(2):
        for g in range(G):
            for page in range(3):
                for bits, which in ((high, True), (low, False)):
                    at = [t for t in range(page * PAGE, (page + 1) * PAGE) if bool(chosen[i, g, t]) == which]
                    part = rows[i, g, at]
                    if bits is not None:
                        groups = part if axis == "token" else part.T
                        part = torch.stack([formula(x, bits) for x in groups])
                        part = part if axis == "token" else part.T
                    torch.testing.assert_close(got[i, g, at], part)


def test_pads_are_worth_less_than_any_token_and_leave_no_trace():
    valid = torch.arange(2 * PAGE) >= torch.tensor([[40], [3], [29]])
    rows, importance = torch.randn(3, G, 2 * PAGE, R), torch.rand(3, G, 2 * PAGE)
    pad = ~valid[:, None]
    for axis in ("token", "channel"):
        packing = salient(axis=axis)
        first, second = (
            packing.store(rows.masked_fill(pad[..., None], x), valid, importance.masked_fill(pad, y))
            for x, y in ((0.0, 0.0), (float("nan"), 9.0))
        )
        assert all(torch.equal(t, second[name]) for name, t in first.items())
        chosen = masks(first)
        assert not (chosen & pad)[:2, :, PAGE:].any()
        assert not (chosen & pad)[1].any()
        # a page of 3 tokens and 29 pads has room for 8
        assert chosen[2, :, :PAGE].sum(-1).tolist() == [8, 8]
        assert chosen[2, :, 29:32].all()
        back = packing.load(first)
        error = (back - rows).abs()[chosen & ~pad].max()
        assert error < 0.02, "pads must not widen the range of a class"


def test_pages_do_not_depend_on_each_other():
    rows, importance, packing = torch.randn(2, G, 3 * PAGE, R), torch.rand(2, G, 3 * PAGE), salient(axis="channel")
    whole = packing.store(rows, None, importance)
    for page in range(3):
        part = slice(page * PAGE, (page + 1) * PAGE)
        own = packing.store(rows[:, :, part], None, importance[:, :, part])
        assert all(torch.equal(t[:, 0], whole[name][:, page]) for name, t in own.items())


@pytest.mark.parametrize(
    ("page", "share", "tokens"), [(32, 0.5, 16), (32, 0.6, 16), (128, 0.6, 80), (128, 0.01, 8), (32, 0.99, 24)]
)
def test_a_share_is_eights_of_tokens(page, share, tokens):
    assert counted(page, share) == tokens


def test_channels_are_divided_by_the_root_of_their_largest_number():
    """By hand: channel 0 reaches 16, so c = 4; channel 1 reaches 1/4, so c = 1/2; channel 2 is 0 and stays so."""
    rows = torch.zeros(1, 1, PAGE, 3)
    rows[..., 3, 0], rows[..., 4, 0], rows[..., 5, 1] = -16.0, 8.0, 0.25
    packing = Separable(Raw(1, 3, PAGE, torch.float32))
    stored = packing.store(rows, None)
    assert stored["gain"].tolist() == [[[[4.0, 0.5, 0.0]]]]
    assert stored["latent"][0, 0, 0, 3:6].tolist() == [[-4.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]
    assert torch.equal(packing.load(stored), rows)
    assert stored["gain"].dtype == torch.float16
    assert packing.page_bytes() == 3 * (4 * PAGE + 2)


@pytest.mark.parametrize("times", [1, 30])
def test_values_of_outlier_channels_lose_less_when_channels_are_separated(times):
    rows = torch.randn(1, G, 4 * PAGE, R)
    rows[..., 2] *= times
    plain = Affine(G, R, PAGE, 4, "token", R)
    small, errors = [0, 1, 3, 4], []
    for packing in (plain, Separable(plain)):
        errors.append(float((packing.load(packing.store(rows, None)) - rows)[..., small].square().mean()))
    assert errors[1] < errors[0] / 5 if times > 1 else errors[1] < errors[0] * 1.5


def test_a_separable_page_of_pads_or_of_what_is_not_finite():
    packing, rows = Separable(salient()), torch.randn(2, G, PAGE, R)
    valid = torch.zeros(2, PAGE, dtype=torch.bool)
    assert packing.load(packing.store(rows.fill_(float("nan")), valid)).isfinite().all()
    for bad in (float("nan"), float("inf"), 1e11):
        rows = torch.randn(2, G, PAGE, R)
        rows[1, 1, 30, 2] = bad
        with pytest.raises(DataError):
            packing.store(rows, None, torch.rand(2, G, PAGE))
