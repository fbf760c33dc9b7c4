"""What was worked out once of things that never change, found again by their identity."""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Known(Generic[T]):
    """Answers by a key that has ids of `owners` in it. These are kept alive as long, so that no other has their id.

    most: answers that are kept; when there are more, all are forgotten.
    """

    def __init__(self, most: int = 1024) -> None:
        self.most, self._found = most, dict[Hashable, tuple[T, tuple[Any, ...]]]()

    def find(self, key: Hashable, owners: tuple[Any, ...], make: Callable[[], T]) -> T:
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= self.most:
                self._found.clear()
            found = self._found[key] = make(), owners
        return found[0]
