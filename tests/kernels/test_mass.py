"""What keys get of many queries, in C++ and in the reference, against probabilities written out in float64."""

from contextlib import suppress

import numpy as np
import pytest
import torch

from kvshrink.kernels import mass, native
from kvshrink.kernels.mass import cpu, reference
from tests.kernels.test_held import rows

KINDS = [reference, *([cpu] if native.library() is not None else [])]
with suppress(ImportError):
    from kvshrink.kernels.mass import triton

    KINDS.append(triton)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def written_out(queries, keys, ends, weights, real, asks, most) -> np.ndarray:
    """[b, h, t], a query at a time."""
    b, h, m, x, _ = queries.shape
    found = np.zeros(keys.shape[:3])
    for row, head, member, n in np.ndindex(b, h, m, x):
        seen = [j for j in range(int(ends[n])) if real is None or real[row, j]]
        if not seen or (asks is not None and not asks[row, n]):
            continue
        scores = keys[row, head, seen].double().numpy() @ queries[row, head, member, n].double().numpy()
        got = np.exp(scores - scores.max())
        got = got / got.sum() * (1.0 if weights is None else float(weights[n]))
        found[row, head, seen] = np.maximum(found[row, head, seen], got) if most else found[row, head, seen] + got
    return found


# what has tiles of its own is run once
TILED = [(kind, tile) for kind in KINDS for tile in ((1, 700, 2**22) if hasattr(kind, "TILE") else (None,))]


@pytest.mark.parametrize(("kind", "tile"), TILED, ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_columns_are_those_of_the_matrix(dtype, tile, kind, monkeypatch):
    """Queries of any length, keys in steps that fill no vector, pads with junk in the middle, queries that see none."""
    if tile is not None:
        monkeypatch.setattr(kind, "TILE", tile)
    on = DEVICE if tile is None else torch.device("cpu")
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    queries, keys = rows(2, 2, 3, 21, 16), rows(2, 2, 37, 16, seed=1, dtype=dtype)
    ends, weights = torch.arange(21) + 17, torch.rand(21)
    real = torch.ones(2, 37, dtype=torch.bool)
    real[0, :5], real[0, 25], real[1] = False, False, torch.arange(37) >= 20
    asks = real[:, 16:]
    dirty = keys.masked_fill(~real[:, None, :, None], torch.nan)
    for given, own in (((None, None, None), keys), ((weights, None, None), keys), ((weights, real, asks), dirty)):
        for most in (False, True):
            want = written_out(queries, keys, ends, *given, most)
            moved = [None if x is None else x.to(on) for x in (queries, own, ends, *given)]
            np.testing.assert_allclose(kind.mass(*moved, most).cpu(), want, **near)
    assert want[1, :, :20].max() == 0 < want[1, :, 20:].min()


def test_far_scores_stay_numbers_and_many_threads_add_up(monkeypatch):
    queries, keys, ends = 30 * rows(1, 1, 4, 600, 8), 30 * rows(1, 1, 600, 8, seed=1), torch.arange(600) + 1
    got = mass.mass(queries, keys, ends)
    assert float(got.sum()) == pytest.approx(2400, rel=1e-4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        torch.testing.assert_close(mass.mass(queries, keys, ends), got, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")
    monkeypatch.setattr(cpu, "mass", None)
    torch.testing.assert_close(mass.mass(queries, keys, ends), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("far", [0.0, 60.0, 200.0, -200.0])
def test_a_score_far_above_or_below_the_first_and_last_keys_is_found(dtype, far):
    """Exponentials of 16-bit scores are taken beside a near guess of the largest; where that is far, beside it."""
    queries, keys = torch.ones(1, 1, 1, 2, 16), torch.zeros(1, 1, 100, 16, dtype=dtype)
    keys[:, :, 40] = far / 16
    keys[:, :, 60] = torch.nan
    real = torch.arange(100)[None] != 60
    got = mass.mass(queries, keys, torch.tensor([70, 100]), None, real)
    want = written_out(queries, keys, torch.tensor([70, 100]), None, real, None, False)
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-3, atol=1e-6)
