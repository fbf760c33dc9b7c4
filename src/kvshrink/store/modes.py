"""Modes of the caller that must not reach what is done here: autocast, a default device, torch.compile, training."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = ("cpu", "cuda", "xpu", "mps")  # kinds of device, each with an autocast of its own


def autocast_on() -> bool:
    """Whether the caller runs under torch.autocast on any kind of device."""
    return bool(torch._C._is_any_autocast_enabled())


@contextmanager
def outside_modes() -> Iterator[None]:
    """A block whose tensors keep their dtypes and are where they are said to be.

    Autocast would round keys, and knows no scales in float16; a default device would part small tables from the rest.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model has no dropout; each of its modules is then in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_dropout(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of a model, or a method of something that has one, with the model in eval mode."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs["model"]
        with evaluating(first if isinstance(first, nn.Module) else first.model):
            return function(*args, **kwargs)

    return run


def own_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside of the caller's autocast and default device."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # a default device is one of the modes on torch's stack of them
        if not autocast_on() and not torch._C._len_torch_function_stack():
            return function(*args, **kwargs)
        with outside_modes():
            return function(*args, **kwargs)

    return run


def compiled() -> bool:
    """Whether this is traced, or called by code that is compiled."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


def at_once(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function: a cache grows at every step, which would compile its code anew."""
    outside = torch.compiler.disable(function, reason="a kvshrink cache grows at every step. Use fullgraph=False")

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # the wrapper alone would cost each call a microsecond
        return outside(*args, **kwargs) if compiled() else function(*args, **kwargs)

    made: Any = run
    made.__code__ = made.__code__.replace(co_name=function.__name__)  # torch.compile counts what it compiled by code
    return run
