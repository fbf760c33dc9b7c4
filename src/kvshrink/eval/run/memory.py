"""Peak memory of decoding one token, beyond what was alive before: the temporaries on top of the held bytes."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvshrink.store.modes import without_dropout


@without_dropout
@torch.inference_mode()
def decode_peak(model: Any, cache: Any, token: Tensor) -> int:
    """Most bytes alive at once while `token` [b, 1] goes through the model with this filled cache, beyond those before.

    It includes the logits and what the step adds to the cache. The cache takes the
    token: give a `copy.deepcopy` of one that is still needed.
    """

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    return peak(step, token.device)


def peak(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once during `step`, beyond those before, counted by the allocator, CUDA's or the CPU's.

    Not the tiles of the C++ kernel: less than a MiB on each thread and some KiB for each of its tasks, four a thread,
    whatever the context.
    """
    return _cuda(step, device) if device.type == "cuda" else _cpu(step)


def _cuda(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu(step: Callable[[], object]) -> int:
    """The running sum of the allocator's events, which the profiler records in order, inside of operators too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints two lines of its own
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most
