"""kernels/decode/triton.py against its reference: in numpy (TRITON_INTERPRET=1) where there is no GPU, else on it.

numpy is slow, so every case covers several things at once: sizes are odd, pages no multiple of a tile, and keys and
values differ in form.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvshrink.kernels.decode import ALL, Basis, Constant, Live, fused, reference
from kvshrink.kernels.decode.gpu.side import fits
from kvshrink.kernels.records import Records, Single
from tests.kernels.samples import FORMS, basis_of, far, masked, packed, placed, ragged, strewn, turn_of
from tests.kernels.tolerances import assert_close

pytest.importorskip("triton", reason="no triton: CUDA devices then decode in plain torch")

REPO = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(query, keys, basis, turn, values, visible, softcap, dtype, live=ALL, constant=None):
    from kvshrink.kernels.decode import triton

    job = [_moved(x) for x in (query, keys, basis, turn, values, visible)]
    more = _moved(live), _moved(constant)
    want = reference.decode(*job, softcap, torch.float32, *more)
    assert_close(triton.decode(*job, softcap, dtype, *more), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_all_keys_have_in_common(dtype):
    keys, values = packed("trellis", 4, 25, 5, 2, dtype), packed(("token", 4), 1, 37, 5, 2, dtype)
    live, visible = Live(skips=torch.tensor([9, 0]).int()), torch.rand(2, 1, 1, 160) > 0.3
    for turn in (turn_of(160, 64), turn_of(160, 64, part=0.5, interleaved=True, scaling=1.3), None):
        common = Constant(torch.randn(2, 4, 3, 64) / 8, torch.randn(4, 64) * 5, turn)
        compare(torch.randn(2, 4, 3, 25) / 5, keys, None, None, values, visible, 5.0, dtype, live, common)


def _moved(x):
    """The same on DEVICE, still as a part of the larger tensors that it is a part of."""
    if isinstance(x, torch.Tensor):
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).to(DEVICE)
        return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())
    if isinstance(x, Records):
        holder = x.holder
        return replace(x, holder=Single(_moved(holder.records)) if isinstance(holder, Single) else holder.to(DEVICE))
    if isinstance(x, Basis):
        return Basis(_moved(x.up), _moved(x.mean))
    return type(x)(*map(_moved, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else x


@pytest.mark.parametrize(("form", "dtype"), [(f, DTYPES[i % 2]) for i, f in enumerate(FORMS)], ids=str)
def test_every_form_rebuilt_and_not(form, dtype):
    """Of keys and, shifted by five, of values; heads that share latents and heads that do not; groups of 16 and all."""
    other = FORMS[(FORMS.index(form) + 5) % len(FORMS)]
    keys, values = packed(form, 2, 25, 3, 2, dtype, 16), packed(other, 1, 37, 3, 2, dtype, 20)
    query, turn = torch.randn(2, 4, 3, 64) / 8, turn_of(96, 64)
    compare(query, keys, basis_of(2, 25, 4, 64), turn, values, None, None, dtype)
    keys, values = packed(form, 2, 70, 5, 1, dtype), packed(other, 2, 70, 5, 1, dtype, 16)
    compare(torch.randn(1, 2, 4, 70) / 8, keys, None, None, values, None, None, dtype)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("form", [("channel", 1), ("token", 3), ("channel", 4), "normal", "trellis"], ids=str)
def test_other_page_sizes(form, page):
    keys, values = (packed(form, 1, 25, 3, 1, torch.float32, 16, page) for _ in range(2))
    basis, turn = basis_of(1, 25, 1, 16), turn_of(3 * page, 16)
    compare(torch.randn(1, 1, 2, 16) / 4, keys, basis, turn, values, None, None, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "heads"), [(64, (1, 8)), (80, (2, 4)), (96, (4, 1)), (128, (2, 1)), (256, (1, 2))])
def test_head_dims_and_ropes(d, heads, dtype):
    """MQA, GQA and MHA; RoPE of all channels, of interleaved and scaled pairs, of a quarter, and none."""
    h, x = heads
    keys, values = packed(("channel", 4), 1, 45, 2, 1, dtype), packed(("token", 4), 1, 20, 2, 1, dtype)
    query, basis = torch.randn(1, h, x, d) * d**-0.5, basis_of(1, 45, h, d)
    turns = [turn_of(64, d, base=1e4), turn_of(64, d, part=0.5, interleaved=True, scaling=1.3)]
    for turn in (*turns, turn_of(64, d, part=0.25), None):
        compare(query, keys, basis, turn, values, None, 5.0, dtype)


@pytest.mark.parametrize("shape", list(itertools.product((1, 3), (1, 4), (1, 2))), ids=str)
def test_masks_of_every_shape(shape):
    compare(*masked(shape, torch.bfloat16), None, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_positions_of_their_own(dtype):
    query, keys, basis, turn, values, visible = placed(dtype)
    for at in (turn.positions, turn.positions.repeat_interleave(2, 1)[:, ::2]):
        compare(query, keys, basis, turn._replace(positions=at), values, visible, None, dtype)


@pytest.mark.parametrize(("form", "lanes"), list(zip(FORMS[::2], itertools.cycle((1, 2, 4)), strict=False)), ids=str)
def test_lanes_that_lack_pages_and_slots(form, lanes):
    job, live = ragged(form, lanes, torch.bfloat16)
    compare(*job, None, torch.bfloat16, live)


@pytest.mark.parametrize("lanes", [1, 4])
def test_pages_and_slots_each_alone(lanes):
    (query, keys, *how, values, _), live = ragged(("token", 4), lanes, torch.float32)
    compare(query, keys, *how, values, None, None, torch.float32)
    for given in (live, Live(live.counts), Live(skips=live.skips)):
        compare(query[..., :20], keys, None, None, values, None, 5.0, torch.float32, given)


def test_rows_that_read_little_of_many_pages():
    """Ranges of which a row or a lane reads nothing, and counts that do not lie in one piece."""
    keys, values = packed("raw", 2, 16, 13, 3, torch.float32), packed("raw", 2, 16, 13, 3, torch.float32)
    keys, values = strewn(keys, values, 2)
    counts = torch.randint(0, 33, (3, 2, 15), dtype=torch.uint8)[..., 1:-1]
    for live in (Live(counts, torch.tensor([300, 416, 0]).int()), Live(counts)):
        compare(torch.randn(3, 4, 2, 16) / 4, keys, None, None, values, None, None, torch.float32, live)


def test_more_ranges_than_are_joined_at_a_time(monkeypatch):
    from kvshrink.kernels.decode import triton

    monkeypatch.setattr(triton, "PER_PROCESSOR", 32)
    keys, values = packed("raw", 1, 16, 120, 1, torch.float32), packed("raw", 1, 16, 120, 1, torch.float32)
    visible = torch.rand(1, 1, 12, 120 * 32) > 0.3
    visible[:, :, 0, : 110 * 32], visible[:, :, 1, 10 * 32 :], visible[:, :, 2] = False, False, False
    compare(torch.randn(1, 1, 12, 16), keys, None, None, values, visible, None, torch.float32)


def test_far_positions():
    """Angles are products in float32, as the reference's are, so that they agree however large they are."""
    keys, values = packed(("channel", 4), 1, 20, 2, 1, torch.float32), packed("raw", 1, 20, 2, 1, torch.float32)
    turn = turn_of(64, 64, first=900_000)
    compare(torch.randn(1, 2, 4, 64) / 8, keys, basis_of(1, 20, 2, 64), turn, values, None, None, torch.float32)


@pytest.mark.parametrize("x", [1, 20, 70])
@pytest.mark.parametrize("pages", [1, 9, 14])
def test_ranges_of_pages_and_blocks_of_rows(pages, x):
    """One range and many, whose last is a part of one; a range of which a row sees nothing."""
    dtype = torch.float32
    keys, values = packed(("token", 4), 1, 16, pages, 1, dtype), packed(("channel", 4), 1, 24, pages, 1, dtype)
    visible = torch.rand(1, 1, x, pages * 32) > 0.3
    visible[:, :, 0], visible[:, :, x // 2, : pages * 16] = False, False
    compare(torch.randn(1, 1, x, 16) / 4, keys, None, None, values, visible, None, dtype)


@pytest.mark.parametrize("form", [("channel", 4), ("token", 3), "normal", "trellis"], ids=str)
def test_latents_that_come_in_parts(form, monkeypatch):
    """As a basis too large to keep has them: all channels of a part may have one scale, or a scale several parts."""
    from kvshrink.kernels.decode import triton

    monkeypatch.setattr(triton, "BASIS_BYTES", 64 * 16 * 2)
    keys, values = packed(form, 1, 90, 2, 1, torch.bfloat16, 32), packed("raw", 1, 16, 2, 1, torch.bfloat16)
    basis, query = basis_of(1, 90, 2, 64), torch.randn(1, 2, 1, 64) / 8
    for group in (32, 48, 128) if form[0] == "token" else (32, 48):
        keys = packed(form, 1, 90, 2, 1, torch.bfloat16, group)
        compare(query, keys, basis, turn_of(64, 64), values, None, None, torch.bfloat16)
        compare(torch.randn(1, 1, 1, 90) / 9, keys, None, None, values, None, None, torch.bfloat16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the file is for the CPU; a GPU would need all its bytes in memory")
@pytest.mark.parametrize("form", [("channel", 4), ("token", 8), "normal", "trellis"], ids=str)
def test_offsets_beyond_32_bits(form, tmp_path):
    pages = far(packed(form, 3, 16, 3, 3, torch.float32), tmp_path)
    compare(torch.randn(3, 3, 2, 16) / 4, pages, None, None, pages, None, None, torch.float32)


def test_programs_compile_for_a_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_does_not_fit_is_left_to_the_reference(monkeypatch):
    keys = packed("raw", 1, 8, 1, 1, torch.float32)
    assert fits(keys, keys)
    assert not fits(keys._replace(page=16), keys)
    assert not fits(keys._replace(page=8), keys._replace(page=8))
    assert not fits(keys._replace(page=24), keys._replace(page=24))
    assert not fits(keys, keys._replace(width=4096))
    assert not fits(keys._replace(width=0), keys)
    from kvshrink.kernels.decode import triton

    cuda = torch.device("cuda")
    assert fused(cuda, keys, keys) == (triton.decode, "")
    other = keys._replace(page=24)
    assert fused(cuda, other, other) == (None, "pages of 24 tokens, latents of 8 and 8 channels")
    assert fused(torch.device("cpu"), keys, keys).kernel is not triton.decode
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    assert fused(cuda, keys, keys) == (None, "KVSHRINK_REFERENCE=1")
