"""Packings around another packing: sparse outliers, low-rank errors, pages in parts."""

import pytest
import torch

from kvshrink.errors import DataError
from kvshrink.methods._packing import Affine, Codebook, Raw
from kvshrink.methods._packing.parts import Parts
from kvshrink.methods._packing.residual import Residual
from kvshrink.methods._packing.sparse import Sparse, sparse

PAGE, WIDTH = 32, 24
INNER = {
    "channel": Affine(2, WIDTH, PAGE, 2, "channel"),
    "token": Affine(2, WIDTH, PAGE, 2, "token", WIDTH),
    "page": Codebook(2, WIDTH, PAGE, torch.tensor([-1.5, -0.5, 0.5, 1.5]), "token", WIDTH, "one"),
}


def rows(pages: int = 2, b: int = 2) -> torch.Tensor:
    return torch.randn(b, 2, pages * PAGE, WIDTH)


def size(stored) -> int:
    return sum(t.nbytes for t in stored.values())


def wrapped() -> list:
    found = [Sparse(INNER[axis], axis, 4, rule) for axis in INNER for rule in ("ends", "far", "large")]
    found += [Residual(INNER["channel"], 3), Sparse(Residual(INNER["token"], 2), "token", 2, "ends")]
    return [*found, Parts(Affine(2, WIDTH, 8, 2, "channel"), 4), Residual(Raw(2, WIDTH, PAGE, torch.float32), 1)]


@pytest.mark.parametrize("packing", wrapped(), ids=lambda p: f"{type(p).__name__}-{getattr(p, 'axis', '')}")
def test_every_wrapping_keeps_the_rules_of_packings(packing):
    x, valid = rows(3), torch.arange(3 * PAGE) >= torch.tensor([[0], [41]])
    stored = packing.store(x, None)
    assert size(stored) == 2 * 3 * packing.page_bytes()
    assert all(t.shape[:2] == (2, 3) for t in stored.values())
    torch.testing.assert_close(packing.fake_quantize(x), packing.load(stored), atol=1e-6, rtol=0)
    parts = [packing.load(packing.store(part, None)) for part in x.split(PAGE, 2)]
    torch.testing.assert_close(torch.cat(parts, 2), packing.load(stored), atol=1e-4, rtol=0)
    pad = ~valid[:, None, :, None]
    clean, dirty = (packing.store(x.masked_fill(pad, junk), valid) for junk in (0.0, torch.nan))
    assert all(torch.equal(t, dirty[name]) for name, t in clean.items())
    assert packing.load(dirty).isfinite().all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, 1, 70, 5] = bad
        with pytest.raises(DataError):
            packing.store(x, None)


def expected(x: torch.Tensor, axis: str, count: int, rule: str) -> torch.Tensor:
    """Which numbers of one page [PAGE, WIDTH] are outliers, vector by vector, by sorting."""
    out = torch.zeros_like(x, dtype=torch.bool)
    views = {"channel": (x.T, out.T), "token": (x, out), "page": (x.reshape(1, -1), out.view(1, -1))}[axis]
    for vector, mark in zip(*views, strict=True):
        if rule == "ends":
            order = vector.argsort()
            mark[torch.cat([order[: count // 2], order[-(count // 2) :]])] = True
        else:
            far = vector if rule == "large" else vector - vector.mean()
            mark[far.abs().argsort()[-count:]] = True
    return out


@pytest.mark.parametrize("axis", INNER)
@pytest.mark.parametrize("rule", ["ends", "far", "large"])
def test_outliers_come_back_to_float16_and_the_rest_as_without_them(axis, rule):
    x = rows(1, 1)
    packing = Sparse(INNER[axis], axis, 4, rule)
    back = packing.load(packing.store(x, None))
    for page, got in zip(x[0], back[0], strict=True):
        out = expected(page, axis, 4, rule)
        assert torch.equal(got[out], page[out].half().float())
        assert (got[~out] != page[~out].half().float()).float().mean() > 0.8


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_the_inner_range_is_that_of_what_stays(axis):
    """One number of a thousand in each vector, the rest between -1 and 1: steps of 2 bits are then 2 / 3 at most."""
    x = torch.rand(1, 2, PAGE, WIDTH) * 2 - 1
    for i in range(max(PAGE, WIDTH)):
        x[:, :, i % PAGE, i % WIDTH] = 1000.0
    packing = Sparse(INNER[axis], axis, 4, "ends")
    stored = packing.store(x, None)
    assert stored["scale"].max() <= 2 / 3 + 1e-3
    assert (packing.load(stored) - x).abs().max() <= 1 / 3 + 1e-2


def test_a_vector_s_outliers_are_replaced_by_a_number_of_its_own_range():
    """GEAR's mean of the whole vector would lie outside: (1000 + 23) / 24 here."""
    x = torch.ones(1, 2, PAGE, WIDTH)
    x[..., 3], x[..., 5] = 1000.0, 0.5
    stored = Sparse(INNER["token"], "token", 2, "ends").store(x, None)
    assert torch.equal(stored["low"], torch.ones_like(stored["low"]))
    assert not stored["scale"].any()


def test_the_mean_of_equal_numbers_is_that_number():
    """Rounded, it would be a range of its own beside them."""
    x = (torch.rand(1, 2, PAGE, 1) * 3e4 + 0.1).repeat(1, 1, 1, WIDTH)
    x[..., 3] = 6e4
    assert not Sparse(INNER["token"], "token", 2, "far").store(x, None)["scale"].any()


def test_equal_numbers_are_treated_alike_and_pads_are_no_outliers():
    x = torch.zeros(1, 2, PAGE, WIDTH)
    x[:, :, :3, 0] = 7.0  # three equal, room for two
    packing = Sparse(INNER["channel"], "channel", 2, "far")
    assert not torch.isfinite(packing.store(x, None)["outliers"][:, :, :, 0]).any()
    valid = torch.arange(PAGE)[None] >= 2  # two of the three are pads
    stored = packing.store(x, valid)
    assert stored["outliers"][0, 0, 0, 0].isfinite().sum() == 1
    assert stored["places"][0, 0, 0, 0].max() == 2
    assert packing.load(stored)[0, 0, 2, 0] == 7


def test_a_vector_of_fewer_real_numbers_than_outliers():
    valid = torch.arange(PAGE)[None] >= PAGE - 3
    x = rows(1, 1)
    for rule in ("ends", "far"):
        packing = Sparse(INNER["channel"], "channel", 8, rule)
        back = packing.load(packing.store(x, valid))
        assert torch.equal(back[:, :, -3:], x[:, :, -3:].half().float())


def test_places_are_bytes_up_to_256_numbers_and_reach_all_of_32768():
    wide = Codebook(1, 1024, PAGE, torch.tensor([-1.0, 1.0]), "token", 1024, "one")
    packing = Sparse(wide, "page", 5, "large")
    x = torch.rand(1, 1, PAGE, 1024)
    x[0, 0, -1, -1] = 50.0
    stored = packing.store(x, None)
    assert stored["places"].dtype == torch.int16
    assert packing.load(stored)[0, 0, -1, -1] == 50
    assert Sparse(INNER["token"], "token", 2, "ends").store(rows(), None)["places"].dtype == torch.uint8


def test_a_share_of_outliers_is_a_count_of_each_vector():
    assert sparse(INNER["page"], "page", 0.01, "large").count == round(0.01 * PAGE * WIDTH)
    assert sparse(INNER["channel"], "channel", 0.1, "ends").count == 2 * round(0.05 * PAGE)
    assert sparse(INNER["token"], "token", 0.01, "ends") is INNER["token"]


def test_an_outlier_beyond_float16_is_refused():
    x = rows(1, 1)
    x[0, 0, 3, 3] = 7e4
    with pytest.raises(DataError):
        Sparse(INNER["page"], "page", 4, "large").store(x, None)


@pytest.mark.parametrize("rank", [1, 2, 4, 24])
def test_the_error_left_is_that_of_the_singular_values(rank):
    """Eckart-Young: no factors of this rank leave less; power iterations come within some percent of it."""
    inner, x = INNER["channel"], rows(2)
    error = x - inner.load(inner.store(x, None))
    packing = Residual(inner, rank)
    left = x - packing.load(packing.store(x, None))
    pages = [part.unflatten(2, (2, PAGE)).flatten(0, 2) for part in (error, left)]
    for before, after in zip(*pages, strict=True):
        tail = torch.linalg.svdvals(before)[rank:].square().sum()
        assert after.square().sum() < before.square().sum()
        assert tail * 0.999 <= after.square().sum() <= tail * 1.1 + 1e-4


def test_an_error_of_exactly_the_rank_is_recovered_to_float16():
    """A page of one constant per channel keeps its minimum, in float16; another part of rank 2 is lost to one level."""
    one_level = Codebook(1, WIDTH, PAGE, torch.tensor([-1e-9, 1e-9]), "token", WIDTH, "one")
    x = (torch.randn(1, 1, PAGE, 2) * torch.tensor([1.0, 0.01])) @ torch.randn(2, WIDTH)
    packing = Residual(one_level, 2)
    back = packing.load(packing.store(x, None))
    assert (back - x).norm() < 1e-3 * x.norm()
    assert (Residual(one_level, 1).fake_quantize(x) - x).norm() > 2e-3 * x.norm(), "both components must matter"


def test_pads_give_no_error():
    x, valid = rows(1, 1), torch.arange(PAGE)[None] >= 20
    stored = Residual(INNER["channel"], 2).store(x * 1000.0 * ~valid[:, None, :, None] + x, valid)
    assert not stored["left"][:, :, :, :20].any()
    assert stored["left"][:, :, :, 20:].any()


def test_parts_are_smaller_pages():
    small, x = Affine(2, WIDTH, 8, 2, "channel"), rows(2)
    packing = Parts(small, 4)
    assert packing.page == PAGE
    assert torch.equal(packing.load(packing.store(x, None)), small.load(small.store(x, None)))


def test_places_of_a_long_vector_are_read_without_a_sign():
    """A page of 2,048 channels has 65,536 numbers: places beyond 32,767 are negative as 16-bit integers."""
    packing = sparse(Codebook(1, 2048, 32, torch.linspace(-1, 1, 16), "token", 2048, "one"), "page", 0.001, "large")
    rows = torch.zeros(1, 1, 32, 2048)
    rows[0, 0, 31, 2000] = 9.0
    assert float(packing.load(packing.store(rows, None))[0, 0, 31, 2000]) == 9.0
