"""Projections of a layer's input that were made to ask for all its queries are not made again in the step itself.

Each is handed out once, to the very input that it was made of, where nothing is learnt and nothing rounded otherwise;
in any other call the module works as ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvshrink.store.modes import autocast_on

OURS = "forward"  # of an instance, before its class's


class Made:
    """Takes the place of a projection's forward for one call."""

    def __init__(self, module: nn.Linear, given: Tensor, found: Tensor) -> None:
        self.module, self.given, self.found = module, given, found

    def __call__(self, given: Tensor) -> Tensor:
        vars(self.module).pop(OURS, None)
        if given is self.given and not torch.is_grad_enabled() and not autocast_on():
            return self.found
        return type(self.module).forward(self.module, given)


@contextmanager
def made_once(module: nn.Module, given: Tensor) -> Iterator[None]:
    """What plain projections make of this input within is what they give when they are called with it next."""
    found: list[tuple[nn.Linear, Tensor]] = []

    def note(child: Any, args: tuple[Any, ...], out: Tensor) -> None:
        if args and args[0] is given:
            found.append((child, out.clone()))  # the module may change it in place

    # a subclass, one with hooks or one that is replaced already may do more than it seems
    plain = [c for c in module.children() if type(c) is nn.Linear and not _watched(c)]
    hooks = [child.register_forward_hook(note) for child in plain]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for child, out in found:
        setattr(child, OURS, Made(child, given, out))


def forget(module: nn.Module) -> None:
    """Let go what a step that was not made would have used."""
    for child in module.children():
        if isinstance(vars(child).get(OURS), Made):
            vars(child).pop(OURS, None)


def _watched(child: nn.Module) -> bool:
    hooks = child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks
    return any(hooks) or OURS in vars(child)
