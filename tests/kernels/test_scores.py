"""kernels/scores/cpu.py against its reference, over the forms, bases and tables that decode reads."""

import pytest
import torch

from kvshrink.kernels.decode import ALL, Constant
from kvshrink.kernels.scores import cpu, reference
from tests.kernels.samples import FORMS, PAGE, basis_of, packed, ragged, turn_of
from tests.kernels.test_decode_cpu import needs_library
from tests.kernels.tolerances import assert_close

F32, BF16 = torch.float32, torch.bfloat16


def compare(query, keys, basis, turn, softcap, dtype, live=ALL, constant=None) -> torch.Tensor:
    want = reference.scores(query, keys, basis, turn, softcap, dtype, live, constant)
    got = cpu.scores(query, keys, basis, turn, softcap, dtype, live, constant)
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    none = torch.zeros(*got.shape[:3], 1)
    assert_close((got.nan_to_num(0, 0, 0), none), (want.nan_to_num(0, 0, 0), none), dtype)
    return got


@needs_library
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_rebuilt_and_not(form, dtype):
    keys, query = packed(form, 2, 25, 3, 2, dtype), torch.randn(2, 4, 3, 64) / 8
    compare(query, keys, basis_of(2, 25, 4, 64), turn_of(3 * PAGE, 64), None, dtype)
    by_head = packed(form, 4, 96, 5, 2, dtype)
    for softcap in (None, 3.0):
        compare(torch.randn(2, 4, 2, 96) / 9, by_head, None, None, softcap, dtype)


@needs_library
def test_slots_that_hold_no_token_have_no_score():
    for form in ("raw", ("token", 4), "trellis"):
        (query, keys, basis, turn, *_), live = ragged(form, 2, BF16)
        got = compare(query, keys, basis, turn, None, BF16, live)
        assert 0.2 < (got == -torch.inf).float().mean() < 0.9


@needs_library
def test_what_is_not_stored_of_keys_counts():
    keys, query = packed("raw", 2, 64, 3, 1, BF16), torch.randn(1, 4, 2, 64) / 8
    part = torch.randn(4, 64)
    got = compare(query, keys, None, None, None, BF16, constant=Constant(query, part, turn_of(3 * PAGE, 64)))
    assert (got - cpu.scores(query, keys, None, None, None, BF16)).abs().max() > 0.1
