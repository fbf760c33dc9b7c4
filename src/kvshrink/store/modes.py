"""Modes of the caller that must not reach what a cache does: torch.autocast and torch.compile."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = ("cpu", "cuda")  # kinds of device, each with an autocast of its own


def autocast_on() -> bool:
    """Whether the caller runs under torch.autocast on any kind of device."""
    return bool(torch._C._is_any_autocast_enabled())


@contextmanager
def without_autocast() -> Iterator[None]:
    """A block whose tensors keep their dtypes: autocast would round keys, and knows no scales in float16."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def own_dtypes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside of the caller's autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not autocast_on():
            return function(*args, **kwargs)
        with without_autocast():
            return function(*args, **kwargs)

    return run


def at_once(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function: a cache grows at every step, which would compile its code anew."""
    outside = torch.compiler.disable(function, reason="a kvshrink cache grows at every step. Use fullgraph=False")

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return run
