"""What a cache stores outlives the step that made it, so it must be an ordinary tensor, without a gradient.

A tensor made under `torch.inference_mode()` can never be written to outside of it: a prompt prefilled there and
continued by `generate` (which runs under `no_grad`) would fail. DynamicCache escapes this only by copying everything.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from kvshrink.store.modes import own_modes

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function so that the tensors it makes are ordinary ones, whatever mode the caller is in."""

    function = own_modes(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
