"""A package whose name is also that of a function: `kvshrink.fit(model, ...)` beside `import kvshrink.fit.probe`."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class Called(ModuleType):
    """A package that can be called as the function `__wrapped__`."""

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def call_as(package: str, function: Callable[..., Any]) -> None:
    """Let a package be called as a function of it, whose documentation and signature it then shows."""
    module = sys.modules[package]
    module.__class__ = Called
    shown: Any = module
    functools.update_wrapper(shown, function, assigned=("__doc__",), updated=())
