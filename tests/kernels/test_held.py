"""Recent tokens in C++ beside the reference: 8 bits bit for bit, attention number by number."""

import pytest
import torch
from test_decode_cpu import needs_library

from kvshrink.kernels import held
from kvshrink.kernels.held import cpu, reference

pytestmark = needs_library
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [2, 8, 64, 80, 130])
def test_eight_bits_are_the_references(dtype, d):
    x = rows(2, 3, 5, d, dtype=dtype)
    x[0, 1, 2], x[1, 0, 0] = 0.0, x[1, 0, 0] * 1e-6
    x[1, 2, 3] *= 3e4 if dtype == torch.float16 else 1e30
    x[1, 2, 3] = x[1, 2, 3].clamp(-65504, 65504) if dtype == torch.float16 else x[1, 2, 3]
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, :0]):
        stored = reference.rounded(given)
        assert torch.equal(cpu.rounded(given), stored)
        assert torch.equal(cpu.unrounded(stored, dtype), reference.unrounded(stored, dtype))
    assert torch.equal(cpu.unrounded(torch.zeros(1, 1, 2, d + 2, dtype=torch.uint8), dtype), x.new_zeros(1, 1, 2, d))


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e", "x", "sinks"), [(64, 64, 3, 4), (128, 128, 1, 0), (40, 24, 9, 1)])
def test_attention_to_what_is_held(dtype, eight, d, e, x, sinks):
    query = 3 * rows(2, 3, x, d, seed=1) / d**0.5
    keys, values = (3 * rows(2, 3, 80, n, dtype=dtype, seed=n) for n in (d, e))
    first = (keys[:, :, :sinks], values[:, :, :sinks]) if sinks else None
    given = [reference.rounded(k) if eight else k for k in (keys, values)]
    room = [k[:, :, 2:70] for k in given]  # as a buffer with room has them
    for softcap in (None, 2.0):
        mine, wanted = (code.attend(query, *room, first, softcap, dtype) for code in (cpu, reference))
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert float((wanted[0] - reference.attend(query, *room, first, None, dtype)[0]).abs().max()) > 1e-2


def test_nothing_held_is_the_sinks_alone_and_far_scores_stay_numbers():
    query, keys = 200 * rows(1, 2, 4, 16, seed=2), rows(1, 2, 6, 16, seed=3)
    for part in (keys[:, :, :0], keys):
        mine, wanted = (c.attend(query, part, part, (keys, keys), None, torch.float32) for c in (cpu, reference))
        assert torch.isfinite(mine[0]).all()
        torch.testing.assert_close(mine[0], wanted[0], rtol=1e-4, atol=1e-4)
    out, lse = cpu.attend(query, keys[:, :, :0], keys[:, :, :0], None, None, torch.float32)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_in_blocks_anywhere(dtype):
    """Of an engine's pool [blocks, h, slots, keys and values]; some rows lack tokens, one has none."""
    d, h, pool = 24, 3, rows(7, 3, 8, 48, dtype=dtype, seed=5)
    block = torch.randint(0, 7, (4, 70), generator=torch.Generator().manual_seed(6))
    slot = torch.arange(70).expand(4, -1) % 8
    at = (block * pool.stride(0) + slot * pool.stride(2)) * pool.itemsize
    at[1, :33], at[2, 60:], at[3] = -1, -1, -1
    whole, query = pool[block, :, slot].transpose(1, 2), 3 * rows(4, h, 5, d, seed=7) / d**0.5
    keys, values = (held.Placed(part, at) for part in (pool[0, :, 0, :d], pool[0, :, 0, d:]))
    for softcap in (None, 2.0):
        for code in (cpu, reference):
            out, lse = code.attend(query, keys, values, None, softcap, dtype)
            for row in range(3):
                own = at[row] >= 0
                parts = (whole[row : row + 1, :, own, :d], whole[row : row + 1, :, own, d:])
                wanted = reference.attend(query[row : row + 1], *parts, None, softcap, dtype)
                torch.testing.assert_close(out[row : row + 1], wanted[0], rtol=2e-5, atol=2e-5)
                torch.testing.assert_close(lse[row : row + 1], wanted[1], rtol=2e-5, atol=2e-5)
            assert (out[3] == 0).all()
            assert (lse[3] == -torch.inf).all()


def test_kernels_that_are_left_out_are_not_asked(monkeypatch):
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    for name in ("rounded", "unrounded", "attend"):
        monkeypatch.setattr(cpu, name, lambda *a: pytest.fail("asked"))
    x = rows(1, 1, 2, 8)
    stored = held.rounded(x)
    held.unrounded(stored, torch.float32)
    assert held.attend(x, stored, stored, None, None, torch.float32) is None
