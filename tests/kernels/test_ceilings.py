import time

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.kernels import ceilings
from kvshrink.kernels.ceilings import measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_once_and_soon(dtype):
    ceilings._measure.cache_clear()
    started = time.thread_time()
    found = measure("cpu", dtype)
    assert time.thread_time() - started < 1
    assert 1e7 < found.flops < 1e15
    assert 1e8 < found.bandwidth < 1e13
    assert measure(torch.device("cpu"), dtype) is found


def test_units(monkeypatch):
    """A call that takes 2 s: 2 x 128 x 128 x 1024 operations, and 64 MiB read and as many written."""
    monkeypatch.setattr(ceilings, "_seconds", lambda call, device: 2.0)
    assert ceilings._measure.__wrapped__("cpu", 0, torch.float32) == (2**24, 2**26)


def test_the_fastest_round_counts(monkeypatch):
    times = iter([0.03, 0.01, 0.02, 0.04, 0.05])
    monkeypatch.setattr(ceilings, "_round", lambda call, device, calls: next(times))
    assert ceilings._seconds(lambda: None, torch.device("cpu")) == 0.01


def test_an_unknown_device_is_refused():
    with pytest.raises(
        SettingError, match=r"^the speed of 'meta' is not known\. Set group_heads to a number, or None\.$"
    ):
        measure("meta", torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_faster_than_its_host():
    here, there = measure("cpu", torch.bfloat16), measure("cuda", torch.bfloat16)
    assert there.flops > here.flops
    assert there.bandwidth > here.bandwidth
