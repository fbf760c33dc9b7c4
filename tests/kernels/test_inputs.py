"""kernels/inputs.py: what a kernel would read beyond its end is refused in one line, before it runs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvshrink.errors import CacheError, KVShrinkError
from kvshrink.kernels import inputs, native
from kvshrink.kernels.decode import ALL, Basis, Live, cpu, fused, reference
from kvshrink.kernels.records import recorded
from tests.kernels.samples import FORMS, basis_of, packed, strewn, turn_of
from tests.kernels.tolerances import assert_close

needs_library = pytest.mark.skipif(native.library() is None, reason="no C++ kernels: decoding runs in plain torch")
KERNELS = [pytest.param("cpu", marks=needs_library), "triton"]


def decode(kernel: str):
    if kernel == "cpu":
        return cpu.decode
    pytest.importorskip("triton", reason="no triton: CUDA devices then decode in plain torch")
    if torch.cuda.is_available():
        pytest.skip("these tensors are on the CPU")
    from kvshrink.kernels.decode import triton

    return triton.decode


def job(form="raw", width=24, **changes) -> dict:
    """Two rows, two groups of four heads, two pages; keys are rebuilt."""
    given = {
        "query": torch.randn(2, 4, 3, 16) / 4,
        "keys": packed(form, 2, width, 2, 2, torch.float32, 16),
        "basis": basis_of(2, width, 4, 16),
        "turn": turn_of(64, 16),
        "values": packed(form, 2, 16, 2, 2, torch.float32, 16),
        "visible": torch.rand(2, 1, 3, 64) > 0.5,
        "softcap": None,
        "live": ALL,
    }
    return given | changes


def edits(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that are nearly this one."""
    shorter = [tensor.narrow(axis, 0, tensor.shape[axis] - 1) for axis in range(tensor.dim())]
    longer = [torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis) for axis in range(tensor.dim())]
    others = [tensor.to(torch.int32), tensor.to(torch.float64), tensor.flatten(), tensor[None], tensor.to("meta")]
    return [*shorter, *longer, *others, tensor[..., :0], tensor[..., :1]]


def same(tensor: torch.Tensor, edited: torch.Tensor) -> bool:
    return tensor.shape == edited.shape and tensor.dtype == edited.dtype and tensor.device == edited.device


def refused(**given) -> None:
    with pytest.raises(KVShrinkError) as caught:
        inputs.check(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_stored_tensors_that_are_not_as_their_form_says(form, side):
    good = job(form)
    assert inputs.check(**good) == 2
    pages = good[side]
    tried = 0
    for name, tensor in pages.stored.items():
        for edited in edits(tensor):
            other_groups = form == "raw" and edited.shape[:2] == (2, 2) and edited.shape[3:] == tensor.shape[3:]
            if not same(tensor, edited) and not (other_groups and edited.shape[2] == 1):  # which would be as good
                refused(**good | {side: pages._replace(stored={**pages.stored, name: edited})})
                tried += 1
        refused(**good | {side: pages._replace(stored={k: v for k, v in pages.stored.items() if k != name})})
    assert tried >= 12


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_records_that_are_not_as_their_form_says(form, side, lanes):
    good = job(form)
    good["keys"], good["values"] = strewn(good["keys"], good["values"], lanes)
    assert inputs.check(**good) == 2
    records = good[side].stored
    tables = [{"start": 1}, {"stop": 1}, {"stop": 3}, {"stop": 0}, {"layout": records.layout._replace(lanes=3)}]
    for change in (*tables, {"layout": records.layout._replace(lanes=3 - lanes)}):
        refused(**good | {side: good[side]._replace(stored=replace(records, **change))})
    for name, tensor in records.items():
        inner = range(3 if lanes > 1 else 2, tensor.dim())
        shorter = [tensor.narrow(axis, 0, tensor.shape[axis] - 1) for axis in inner]
        longer = [torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis) for axis in inner]
        others = [tensor.to(torch.int32), tensor.to(torch.float64), tensor.flatten(2), tensor[..., None]]
        for edited in (*shorter, *longer, *others):
            if edited.shape[2:] != (1, *tensor.shape[3:]):  # one group would be as good
                other = recorded({**records, name: edited}, lanes if edited.shape[2] % lanes == 0 else 1)
                refused(**good | {side: good[side]._replace(stored=other)})
        fields = {n: field for n, field in records.layout.fields.items() if n != f"{side}.{name}"}
        other = replace(records, layout=records.layout._replace(fields=fields))
        refused(**good | {side: good[side]._replace(stored=other)})


def test_slots_that_are_not_as_the_pages():
    good = job(("token", 4))
    counts, skips = torch.full((2, 2, 2), 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    good["keys"], good["values"] = strewn(good["keys"], good["values"], 2)
    assert inputs.check(**good | {"live": Live(counts, skips)}) == 2
    for edited in (*edits(counts), counts + 1, counts.bool()):
        if not same(counts, edited) or int(edited.max()) > 32:
            refused(**good | {"live": Live(counts=edited)})
    for edited in (*edits(skips), skips.long()):
        if not same(skips, edited):
            refused(**good | {"live": Live(skips=edited)})
    good["keys"] = good["keys"]._replace(stored=dict(good["keys"].stored))  # tensors are one lane
    refused(**good | {"live": Live(counts)})
    assert inputs.check(**good | {"live": Live(counts[:, :1])}) == 2


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pages_that_say_other_than_they_are(form, side):
    good, pages = job(form), job(form)[side]
    changes = [{"width": pages.width + 1}, {"width": 0}, {"width": -1}, {"page": 16}, {"page": 0}, {"form": "other"}]
    if form != "raw":
        (bits, channels), *more = pages.runs
        changes += [{"runs": ()}, {"runs": ((bits, channels - 1), *more)}, {"runs": ((5, channels), *more)}]
        changes += [{"runs": ((bits % 4 + 1, channels), *more)}, {"runs": ((bits, channels + 9), (bits, -9), *more)}]
    if form != "raw" and form[0] != "channel":
        changes += [{"group": 0}, {"group": -16}, {"group": 3}]
    if form != "raw" and form[0] == "table":
        changes += [{"levels": None}, {"levels": pages.levels[:-1]}, {"levels": torch.randn(300)}]
    for change in changes:
        refused(**good | {side: pages._replace(**change)})
    refused(**good | {side: pages._replace(stored={})})


def test_what_comes_with_the_pages():
    good = job()
    basis, turn = good["basis"], good["turn"]
    query = good["query"]
    for edited in (query[:1], query[:, :3], query[:, :, :2], query[..., :15], query[..., :0], query.to("meta")):
        refused(**good | {"query": edited})
    for sizes in ((1, 24, 4, 16), (2, 23, 4, 16), (2, 25, 4, 16), (2, 0, 4, 16), (2, 24, 8, 16), (2, 24, 4, 15)):
        refused(**good | {"basis": basis_of(*sizes)})
    refused(**good | {"basis": Basis(basis.up.to("meta"), basis.mean)})
    refused(**good | {"basis": Basis(basis.up, basis.mean.to("meta"))})
    for positions in (*edits(turn.positions), turn.positions.float(), turn.positions.expand(3, -1)):
        if not same(turn.positions, positions) and positions.dtype != torch.int32:
            refused(**good | {"turn": turn._replace(positions=positions)})
    for frequencies in (torch.ones(9), torch.ones(2, 4), torch.ones(())):
        refused(**good | {"turn": turn._replace(inv_freq=frequencies)})
    for visible in edits(good["visible"]):
        if not same(good["visible"], visible) and visible.shape[:3] not in ((1, 1, 3), (2, 1, 1)):
            refused(**good | {"visible": visible})
    for softcap in (0.0, -1.0, float("nan"), float("inf")):
        refused(**good | {"softcap": softcap})
    refused(**good | {"basis": None, "turn": None})
    refused(**good | {"basis": None})


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_ask(kernel):
    """A byte a page instead of what the widths say: it was read, and what lies behind it."""
    good = job(("channel", 4))
    keys = good["keys"]
    for stored in ({"codes": keys.stored["codes"][..., :1]}, {"codes": keys.stored["codes"][..., :0]}):
        bad = good | {"keys": keys._replace(stored={**keys.stored, **stored})}
        for keys in (bad["keys"], bad["keys"]._replace(stored=recorded(bad["keys"].stored))):
            with pytest.raises(CacheError, match="codes of keys: uint8"):
                decode(kernel)(**bad | {"keys": keys}, precision=torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("what", ["pages", "rows", "queries", "heads"])
def test_nothing_at_all(kernel, what):
    good = job(("token", 4), turn=None, visible=None)
    for side in ("keys", "values"):
        stored = {name: tensor[:, :0] if what == "pages" else tensor for name, tensor in good[side].stored.items()}
        stored = {name: tensor[:0] if what == "rows" else tensor for name, tensor in stored.items()}
        good[side] = good[side]._replace(stored=stored)
    if what == "rows":
        good["query"] = good["query"][:0]
    if what == "queries":
        good["query"] = good["query"][:, :, :0]
    if what == "heads":
        good |= {"query": good["query"][:, :0, :, :], "basis": Basis(torch.randn(2, 24, 0), torch.randn(2, 0))}
    as_records = {side: good[side]._replace(stored=recorded(good[side].stored)) for side in ("keys", "values")}
    for given in (good, good | as_records):
        nothing(*decode(kernel)(**given, precision=torch.float32), good)


def nothing(out, lse, good):
    assert out.shape == (*good["query"].shape[:3], 16)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@needs_library
def test_widths_that_share_a_vector_are_left_to_the_reference():
    pages = packed("normal", 1, 48, 1, 1, torch.float32)
    device = torch.device("cpu")
    assert fused(device, pages, pages) == (cpu.decode, "")
    other = pages._replace(runs=((4, 24), (2, 24)))
    assert fused(device, other, pages) == (None, "runs of channels that share a vector of 16")


@needs_library
def test_no_channels_at_all():
    """All of a side's channels were given 0 bits: every key is the mean."""
    good = job("normal")
    empty = {"codes": torch.zeros(2, 2, 1, 0, dtype=torch.uint8), "gain": torch.zeros(2, 2, 1, 0, dtype=torch.float16)}
    keys = good["keys"]._replace(stored=empty, width=0, runs=(), group=1)
    given = good | {"keys": keys, "basis": Basis(torch.zeros(1, 0, 64), torch.randn(1, 64))}
    for dtype in (torch.float32, torch.bfloat16):
        want = reference.decode(**given, precision=dtype)
        assert_close(cpu.decode(**given, precision=dtype), want, dtype)
    values = good["values"]._replace(stored=empty, width=0, runs=(), group=1)
    out, lse = cpu.decode(**good | {"values": values}, precision=torch.float32)
    assert out.shape == (2, 4, 3, 0)
    assert lse.isfinite().any()


@needs_library
def test_nothing_is_read_beyond_the_end():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.guarded"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout.split()[0]) > 800
