"""The model that a cache was made for: what was known of it then, and a way to look at it again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvshrink.identity import Identity


@dataclass
class Owner:
    """identity: of the model whose tokens the cache holds. decoder: a weak reference to the module that was last found
    to be that model.

    seen: what a glance at it showed then, by which a change is noticed.
    look: a function from a decoder to its identity as it is now.
    """

    identity: Identity
    decoder: Callable[[], Any]
    seen: Any
    look: Callable[[Any], Identity]

    def now(self) -> Identity:
        """The model's identity as it is now; as it was, if the model is gone."""
        decoder = self.decoder()
        return self.identity if decoder is None else self.look(decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        return replace(self)  # a fork of a cache is of the same model

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled cache leaves the model behind, and is compared with the next one that uses it."""
        return Owner, (self.identity, gone, None, self.look)


def gone() -> None:
    """A reference to a model that is not here."""
