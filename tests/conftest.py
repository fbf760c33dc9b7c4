"""Strict by default: fixed seed, NaN in every fresh float buffer, no network, one thread per worker.

Annotations, shapes among them, are checked in every test but slow ones, and of a test with many cases in a quarter of
them, always the same ones: checks take as long as what they check.
"""

import os
from zlib import crc32

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from unittest.mock import patch

import jaxtyping
import pytest
import torch

pytest_plugins = ["tests.scenarios.summary"]  # prints the count of lossless scenarios, also under xdist

if not torch.cuda.is_available():  # before anything imports triton: its programs then run in numpy
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
_empty, _new_empty = torch.empty, torch.Tensor.new_empty


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, help="cases of every fuzzer in tests/fuzz; default: as many as take seconds")


@pytest.fixture
def fuzz_cases(request):
    """A function from a fuzzer's own small number of cases to the number that was asked for."""
    return lambda small: request.config.getoption("--fuzz") or small


def _poison(out):
    return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out


def pytest_collection_modifyitems(items):
    """Files with slow tests first: workers take whole files, and one that comes last would be waited for alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    one_of_many = hasattr(item, "callspec") and crc32(item.nodeid.encode()) % 4 > 0
    unchecked = one_of_many or item.get_closest_marker("slow") is not None
    with patch.object(jaxtyping.config, "jaxtyping_disable", unchecked):
        return (yield)


@pytest.fixture(autouse=True)
def strict():
    torch.manual_seed(0)
    with (
        patch("torch.empty", lambda *a, **k: _poison(_empty(*a, **k))),
        patch("torch.Tensor.new_empty", lambda *a, **k: _poison(_new_empty(*a, **k))),
    ):
        yield
