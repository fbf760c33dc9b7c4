"""The name by which a config sends its model's attention to us, and what it sent it to before.

A config may be shared by models, and copied into new ones. So the name itself says what came before it: every model
that finds it in its config, attached or not, can go on as it was.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from kvshrink.errors import CacheError

NAME = "kvshrink"
PREVIOUS = "_kvshrink_previous"  # attribute of the decoder and its attention: what its config named before attach


class Ours(str):
    """Equal to "kvshrink", with the implementation that it took the place of."""

    previous: str | None

    def __new__(cls, previous: str | None) -> "Ours":
        self = super().__new__(cls, NAME)
        self.previous = previous
        return self

    def __getnewargs__(self) -> tuple:
        return (self.previous,)

    def __format__(self, spec: str) -> str:
        """As messages of transformers show it where they refuse it, such as continuous batching."""
        return f"{NAME} (attached; kvshrink.detach(model) undoes it)"


def named(config: PreTrainedConfig, default: str | None = "eager") -> str | None:
    """The implementation that a config names, or named before ours; default: where only our bare name is known."""
    name: str | None = config._attn_implementation
    if isinstance(name, Ours):
        return name.previous
    return default if name == NAME else name


def previous(module: Any) -> str:
    """The implementation that takes the calls of an attached module that are not ours."""
    before = named(module.config, getattr(module, PREVIOUS, None))
    return before or "eager"


def is_ours(module: Any) -> bool:
    """Whether an attention module calls our attention; another one is given all keys at full width.

    Raises CacheError for an implementation whose masks we cannot read.
    """
    name = module.config._attn_implementation
    if name is not None and ("flex" in name or "flash" in name):
        raise CacheError(f"{name!r} was chosen after attach, and cannot read a shrunken cache. Choose 'sdpa'.")
    return bool(name == NAME)


def choose(config: PreTrainedConfig, name: str | None) -> None:
    """Name another implementation in this config alone; its setter would change the configs inside it as well."""
    config._attn_implementation_internal = name


def distinct(configs: Iterable[PreTrainedConfig]) -> list[PreTrainedConfig]:
    """Each config once, though configs are compared by value."""
    return list({id(config): config for config in configs}.values())
