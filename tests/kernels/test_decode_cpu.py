"""kernels/decode/cpu.py against its reference: stored forms, odd shapes, masks, positions, and what lies around."""

import itertools
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvshrink.kernels import jobs, native
from kvshrink.kernels.decode import ALL, Basis, Constant, Live, cpu, fused, reference
from tests.kernels.samples import FORMS, PAGE, basis_of, far, masked, packed, placed, ragged, strewn, turn_of
from tests.kernels.tolerances import assert_close

needs_library = pytest.mark.skipif(native.library() is None, reason="no C++ kernels: decoding runs in plain torch")
DTYPES = [torch.float32, torch.bfloat16]


def compare(query, keys, basis, turn, values, visible, softcap, dtype, live=ALL):
    want = reference.decode(query, keys, basis, turn, values, visible, softcap, dtype, live)
    assert_close(cpu.decode(query, keys, basis, turn, values, visible, softcap, dtype, live), want, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_rebuilt_and_not(form, dtype):
    for (h, x, d), groups, width, pages in [((8, 4, 128), 8, 25, 3), ((2, 3, 64), 1, 21, 1), ((4, 1, 80), 2, 51, 7)]:
        keys = packed(form, groups, width, pages, 2, dtype)
        values = packed(form, 1, 70, pages, 2, dtype)
        query, turn = torch.randn(2, h, x, d) * d**-0.5, turn_of(pages * PAGE, d)
        compare(query, keys, basis_of(groups, width, h, d), turn, values, None, None, dtype)
    for (h, x), width, values_group in [((4, 4), 128, 32), ((2, 9), 96, 20), ((3, 1), 30, 64)]:
        keys = packed(form, h, width, 5, 1, dtype)
        values = packed(form, h, width, 5, 1, dtype, values_group)
        compare(torch.randn(1, h, x, width) * width**-0.5, keys, None, None, values, None, None, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["normal", "trellis", "trellis up to 4"])
@pytest.mark.parametrize("width", [160, 240, 320, 400, 640])
def test_runs_of_many_channels(width, form, dtype):
    """Two, three, four, five sixteens of each width, and eight, which are unpacked 64 codes at a time."""
    keys, values = packed(form, 2, width, 3, 2, dtype), packed(form, 1, width, 3, 2, dtype)
    compare(torch.randn(2, 4, 3, width) * width**-0.5, keys, None, None, values, None, None, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(1, 8), (2, 4), (4, 1)], ids=["MQA", "GQA", "MHA"])
def test_head_dims_and_ropes(d, heads, dtype):
    h, x = heads
    keys, values = packed(("channel", 4), 1, 45, 4, 1, dtype), packed(("token", 4), 1, 45, 4, 1, dtype)
    query, basis = torch.randn(1, h, x, d) * d**-0.5, basis_of(1, 45, h, d)
    turns = [
        turn_of(128, d, base=1e4),
        turn_of(128, d, part=0.5, interleaved=True, scaling=1.3),
        turn_of(128, d, part=0.25),
    ]
    for turn in (*turns, None):
        compare(query, keys, basis, turn, values, None, 5.0, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"part": 0.5, "interleaved": True, "scaling": 1.3}, {"base": 1e4, "first": 120_000}, {"part": 0.0}, None],
    ids=str,
)
def test_what_all_keys_have_in_common(settings, dtype):
    """Of pages that follow each other, and of one whose tokens do not; beside angles in float64, as the kernel's."""
    forms = ("trellis", ("token", 4), ("channel", 4), ("table", 3))
    for ((b, h, x, d), groups), form in zip([((1, 8, 4, 128), 8), ((2, 4, 3, 64), 1)] * 2, forms, strict=True):
        keys, values = packed(form, groups, 48, 5, b, dtype), packed("trellis", h, 32, 5, b, dtype)
        turn = None if settings is None else turn_of(5 * PAGE, d, **settings)
        if turn is not None:
            positions = turn.positions.clone()
            positions[:, 3 * PAGE + 7 :] += 3
            turn = turn._replace(positions=positions)
        common = Constant(torch.randn(b, h, x, d) * d**-0.5, torch.randn(h, d) * 5, turn)
        visible = torch.rand(b, 1, 1, 5 * PAGE) > 0.3
        query = torch.randn(b, h, x, 48) / 7
        near = common if turn is None else common._replace(turn=turn._replace(inv_freq=turn.inv_freq.double()))
        for softcap in (None, 5.0):
            job = (query, keys, None, None, values, visible, softcap, dtype, ALL)
            assert_close(cpu.decode(*job, common), reference.decode(*job, near), dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", list(itertools.product((1, 3), (1, 4), (1, 2))), ids=str)
def test_masks_of_every_shape(shape, dtype):
    compare(*masked(shape, dtype), None, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_of_their_own(dtype):
    compare(*placed(dtype), None, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_lanes_that_lack_pages_and_slots(form, lanes, dtype):
    (query, keys, *how, values, visible), live = ragged(form, lanes, dtype)
    compare(query, keys, *how, values, None, None, dtype)
    for given in (live, Live(live.counts), Live(skips=live.skips)):
        compare(query, keys, *how, values, visible, None, dtype, given)
        compare(query[..., :20], keys, None, None, values, None, 5.0, dtype, given)


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_read_little_of_many_pages(threads):
    """Threads to which nothing falls, and counts that do not lie in one piece."""
    keys, values = packed("raw", 2, 16, 13, 3, torch.float32), packed("raw", 2, 16, 13, 3, torch.float32)
    keys, values = strewn(keys, values, 2)
    counts, before = torch.randint(0, 33, (3, 2, 15), dtype=torch.uint8)[..., 1:-1], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for live in (Live(counts, torch.tensor([300, 416, 0]).int()), Live(counts)):
            compare(torch.randn(3, 4, 2, 16) / 4, keys, None, None, values, None, None, torch.float32, live)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("form", [("channel", 4), ("token", 8), "normal", "trellis"], ids=str)
def test_offsets_beyond_32_bits(form, tmp_path):
    pages = far(packed(form, 3, 16, 3, 3, torch.float32), tmp_path)
    compare(torch.randn(3, 3, 2, 16) / 4, pages, None, None, pages, None, None, torch.float32)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    keys, values = (
        packed(("channel", 4), 2, 20, 9, 2, torch.bfloat16),
        packed(("token", 4), 1, 40, 9, 2, torch.bfloat16),
    )
    query, basis, before = torch.randn(2, 2, 3, 64) / 8, basis_of(2, 20, 2, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(query, keys, basis, turn_of(288, 64), values, None, None, torch.bfloat16)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_far_positions():
    """The kernel's angles are float64; the reference's are float32, and off by up to .004 at position 100,000."""
    keys, values = packed(("channel", 4), 1, 45, 4, 1, torch.float32), packed(("token", 4), 1, 45, 4, 1, torch.float32)
    query, basis, turn = torch.randn(1, 2, 4, 64) / 8, basis_of(1, 45, 2, 64), turn_of(128, 64, first=100_000)
    got = cpu.decode(query, keys, basis, turn, values, None, None, torch.float32)
    near = turn._replace(inv_freq=turn.inv_freq.double())
    want = reference.decode(query, keys, basis, near, values, None, None, torch.float32)
    assert_close(got, want, torch.float32)


@needs_library
def test_slow_turns_are_as_good_as_exact_ones():
    """In bfloat16 most pairs of a long base are taken as turning linearly within a page; that must not show."""
    keys, values = packed(("channel", 8), 1, 64, 4, 1, torch.bfloat16), packed("raw", 1, 16, 4, 1, torch.bfloat16)
    query, basis = torch.randn(1, 8, 4, 128), basis_of(1, 64, 8, 128)
    errors = {}
    for base in (3.0, 1e7):  # none of them slow, nearly all of them
        turn = turn_of(128, 128, first=9000, base=base)
        want = reference.decode(query, keys, basis, turn, values, None, None, torch.bfloat16)
        got = cpu.decode(query, keys, basis, turn, values, None, None, torch.bfloat16)
        errors[base] = float((got[1] - want[1]).abs().mean())
    assert errors[1e7] < 2 * errors[3.0] + 1e-3


@needs_library
def test_other_page_sizes_and_a_set_environment_are_left_to_the_reference(monkeypatch):
    keys = packed("raw", 1, 8, 1, 1, torch.float32)
    assert fused(torch.device("cpu"), keys, keys).kernel is cpu.decode
    assert fused(torch.device("cpu"), keys._replace(page=16), keys) == (None, "pages of 16 and 32 tokens")
    other = keys._replace(page=16)
    assert fused(torch.device("cpu"), other, other) == (None, "pages of 16 tokens; C++ reads 32")
    assert fused(torch.device("cpu"), None, keys) == (None, "no kernel reads this form of keys")
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    assert fused(torch.device("cpu"), keys, keys) == (None, "KVSHRINK_REFERENCE=1")


@needs_library
def test_a_large_mean_does_not_shift_the_scores():
    """As the biases of some models' keys make it: rounded to bfloat16 it would move all scores of the body alike."""
    keys, values = packed(("channel", 8), 1, 64, 4, 1, torch.bfloat16), packed("raw", 1, 16, 4, 1, torch.bfloat16)
    query, basis = torch.randn(1, 8, 4, 128) / 128**0.5, basis_of(1, 64, 8, 128)
    basis = Basis(basis.up, basis.mean * 500)  # deviation 100
    compare(query, keys, basis, turn_of(128, 128, base=1e7), values, None, None, torch.bfloat16)


@needs_library
def test_threads_that_meet_a_basis_at_once_prepare_it_once(monkeypatch):
    keys, values = packed(("channel", 4), 1, 20, 2, 1, torch.float32), packed("raw", 1, 16, 2, 1, torch.float32)
    query, basis, made = torch.randn(1, 2, 1, 64) / 8, basis_of(1, 20, 2, 64), []
    real = jobs._Prepared.__init__

    def slow(self, *args):
        time.sleep(0.05)
        made.append(self)
        real(self, *args)

    monkeypatch.setattr(jobs._Prepared, "__init__", slow)
    job = (query, keys, basis, turn_of(64, 64), values, None, None, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        outs = [f.result() for f in [pool.submit(cpu.decode, *job) for _ in range(4)]]
    assert len(made) == 1
    assert all(torch.equal(out, outs[0][0]) for out, _ in outs)
    copied = pickle.loads(pickle.dumps(basis))
    assert not copied.prepared
    assert_close(cpu.decode(query, keys, copied, *job[3:]), outs[0], torch.float32)
