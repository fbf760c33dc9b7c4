"""What the C++ kernels do with AVX-512, also where there is none: its instructions as loops (sanitize/)."""

import itertools
from pathlib import Path

import pytest
import torch

from kvshrink.kernels import native
from kvshrink.kernels.decode import cpu
from tests.kernels.samples import PAGE, basis_of, packed, turn_of
from tests.kernels.test_decode_cpu import compare, needs_library

LOOPS = Path(__file__).parent / "sanitize"
MACROS = ("__AVX512F__", "__AVX512BF16__", "__AVX512VBMI__")
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


def test_it_is_another_library(emulated):
    """Else the tests above would be of what the processor has anyway."""
    keys = packed("trellis up to 4", 4, 64, 1, 1, BF16)
    query = torch.randn(1, 4, 1, 64)
    emulated_lse = cpu.decode(query, keys, None, None, keys, None, None, BF16)[1]
    float_lse = cpu.decode(query, keys, None, None, keys, None, None, torch.float32)[1]
    assert not torch.equal(emulated_lse, float_lse), "products of pairs round what products of floats do not"
