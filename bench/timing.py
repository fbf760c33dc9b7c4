"""Times of several contenders, taken in turn in one process, and what they were taken on."""

import hashlib
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from kvshrink.kernels import native

transformers_logging.set_verbosity_error()


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round that is not measured."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def captured(step: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """(the step's kernels as one CUDA graph, True), so that a GPU does not wait for Python; (the step, False) where it
    cannot be captured."""
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # kernels are compiled and tuned at their first calls
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        return step, False
    return graph.replay, True


def against(times: dict[str, list[float]], name: str, base: str) -> dict:
    """Time of `name` over that of `base`: median of medians, quartiles over rounds, and of all rounds together (which
    has in it what happens in some rounds alone, as a page that leaves the window)."""
    ours, theirs = times[name], times[base]
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quarter = len(pairs) // 4
    return {
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 4),
        "quartiles": [round(pairs[quarter], 4), round(pairs[-1 - quarter], 4)],
        "total": round(sum(ours) / sum(theirs), 4),
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Bytes read per second, the best of some passes over 512 MiB: what a decode step cannot be faster than.

    A sum reads and writes nothing back, as attention over a cache does. On a GPU it is a copy, read and write counted.
    """
    x = torch.ones(2**27, device=device)  # float32
    y = torch.empty_like(x) if device.type == "cuda" else None
    best = float("inf")
    for _ in range(7):
        wait(device)
        start = time.perf_counter()
        x.sum() if y is None else y.copy_(x)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return x.nbytes * (1 if y is None else 2) / best


def setting(device: torch.device) -> dict:
    """What the numbers depend on, of this machine and its software."""
    found = {
        "source": _source(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in ("transformers", "triton", "optimum-quanto", "hqq"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        return {**found, "device": torch.cuda.get_device_name(device)}
    return {**found, "device": _processor(), "kernel": "c++" if native.library() is not None else "torch"}


def _source() -> str:
    """Digest of the code: what was measured before a change of it is not gone on with."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(p for folder in ("src", "bench") for p in (root / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h") and "venv" not in path.parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"{platform.machine()} {capability}{', bf16 products' if bf16 else ''}"
