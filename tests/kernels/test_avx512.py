"""What the C++ kernels do with AVX-512, also where there is none: its instructions as loops (sanitize/)."""

import itertools
from pathlib import Path

import pytest
import torch

from kvshrink.kernels import native
from kvshrink.kernels.decode import cpu, reference
from kvshrink.kernels.latents import load
from tests.kernels.samples import PAGE, basis_of, packed, turn_of
from tests.kernels.test_decode_cpu import compare, needs_library

LOOPS = Path(__file__).parent / "sanitize"
MACROS = ("__AVX512F__", "__AVX512BF16__", "__AVX512VBMI__", "__AVX512VNNI__")
BF16 = torch.bfloat16
FORMS = [
    "raw",
    "normal",
    "trellis",
    "trellis up to 4",
    *itertools.product(("channel", "token"), (4, 3, 8)),
    ("table", 3),
]

pytestmark = needs_library


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library built so, in the place of the real one."""
    with pytest.MonkeyPatch.context() as patch:
        defined = " ".join(f"-U{name} -D{name}" for name in MACROS)
        patch.setenv("KVSHRINK_CXXFLAGS", f"-I{LOOPS} {defined} -Wno-psabi")
        patch.setenv("KVSHRINK_CACHE", str(tmp_path_factory.mktemp("emulated")))
        native.forget()
        assert native.library() is not None, native.why()
        yield
    native.forget()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pages_read_by_pairs(emulated, form):
    keys, values = packed(form, 2, 70, 2, 1, BF16), packed(form, 1, 48, 2, 1, BF16)
    query, turn = torch.randn(1, 4, 2, 64) / 8, turn_of(2 * PAGE, 64)
    compare(query, keys, basis_of(2, 70, 4, 64), turn, values, None, None, BF16)
    even = packed(form, 1, 96, 2, 1, BF16)  # rows whose values are read as they lie are of whole blocks of 32 channels
    compare(query, keys, basis_of(2, 70, 4, 64), turn, even, None, None, BF16)
    wide = packed(form, 4, 64, 2, 1, BF16)
    compare(query, wide, None, None, values, None, None, BF16)


WHOLE = ["trellis up to 4", *itertools.product(("channel", "token", "table"), (1, 2, 3, 4))]


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("form", WHOLE, ids=str)
@pytest.mark.parametrize(("width", "group"), [(128, 32), (70, 16), (64, 64)], ids=str)
def test_codes_that_stand_for_whole_numbers_meet_products_of_bytes(emulated, form, width, group):
    """Which round a query to 15 bits and a weight to 16: products of pairs in bfloat16 are ten times further off."""
    keys, values = (packed(form, 2, width, 3, 1, BF16, group) for _ in range(2))
    query = 3 * torch.randn(1, 4, 3, width) / width**0.5
    found = cpu.decode(query, keys, None, None, values, None, None, BF16)
    want = reference.decode(query, keys, None, None, values, None, None, BF16)
    assert relative(found[0], want[0]) < 3e-4
    assert relative(found[1], want[1]) < 1e-4


def both(query, keys, values):
    return (code.decode(query, keys, None, None, values, None, None, BF16)[0] for code in (cpu, reference))


@pytest.mark.parametrize("part", ["scale", "low"])
@pytest.mark.parametrize("number", [-0.5, torch.inf, torch.nan, 6e-8], ids=str)
def test_scales_that_bytes_cannot_meet(emulated, number, part):
    """Below 0, endless, or none: such pages are read by pairs of floats, and others as before."""
    for form in (("channel", 4), ("token", 4)):
        keys, values = (packed(form, 2, 64, 3, 1, BF16) for _ in range(2))
        query = torch.randn(1, 4, 2, 64) / 8
        values.stored[part][:, 1, 0, 5] = number
        found, want = both(query, keys, values)
        assert torch.equal(found.isfinite(), want.isfinite())
        assert torch.allclose(found[want.isfinite()], want[want.isfinite()], atol=0.02, rtol=0.02)
        keys.stored[part][:, 1, 0, 5] = number
        found, want = (x[:, 2:] for x in both(query, keys, values))  # heads of the other group
        assert torch.allclose(found, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("number", [torch.inf, torch.nan, 1e-38, 1e30], ids=str)
def test_queries_that_bytes_cannot_meet(emulated, number):
    keys, values = packed(("token", 4), 2, 64, 3, 1, BF16), packed(("token", 4), 2, 64, 3, 1, BF16)
    query = torch.randn(1, 4, 2, 64) / 8
    query[0, 1, 1, 7] = number
    found, want = both(query, keys, values)
    others = torch.ones(1, 4, 2, dtype=torch.bool)
    others[0, 1, 1] = abs(number) < torch.inf
    assert torch.allclose(found[others], want[others], atol=0.02, rtol=0.02)


def test_one_token_that_has_nearly_all_weight(emulated):
    """The others of its page weigh a ten-thousandth each: in eight bits they would be nothing."""
    keys, values = packed(("token", 4), 1, 64, 1, 1, BF16), packed(("table", 4), 1, 64, 1, 1, BF16)
    direction = load(keys)[0, 0, 9]
    scores = load(keys)[0, 0] @ direction
    query = (direction * 9.2 / (scores[9] - scores.median()))[None, None, None]
    found = cpu.decode(query, keys, None, None, values, None, None, BF16)[0]
    assert relative(found, reference.decode(query, keys, None, None, values, None, None, BF16)[0]) < 1e-4


def test_it_is_another_library(emulated):
    """Else the tests above would be of what the processor has anyway."""
    keys = packed("trellis up to 4", 4, 64, 1, 1, BF16)
    query = torch.randn(1, 4, 1, 64)
    emulated_lse = cpu.decode(query, keys, None, None, keys, None, None, BF16)[1]
    float_lse = cpu.decode(query, keys, None, None, keys, None, None, torch.float32)[1]
    assert not torch.equal(emulated_lse, float_lse), "products of pairs round what products of floats do not"
