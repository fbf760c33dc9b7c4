"""A probe of seconds, for tests that ask whether methods which measure losses run, not how well they choose."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvshrink.fit import recall


@contextmanager
def small_probe() -> Iterator[None]:
    """One row of 512 tokens instead of four of 2,048."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "ROWS", 1)
        patch.setattr(recall, "LENGTH", 512)
        yield
