"""Byte counts, in one place: what is held is summed over live storages, never estimated."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors. A view of a large buffer counts as the whole buffer."""
    storages = {(s.data_ptr(), s.device): s.nbytes() for t in tensors if (s := t.untyped_storage()).nbytes()}
    return sum(storages.values())


@dataclass(frozen=True)
class Held:
    """Bytes one layer holds, by what they are for."""

    payload: int = 0  # latents or codes of the body
    metadata: int = 0  # scales, minima, indices of the body
    window: int = 0  # recent tokens, exact
    sinks: int = 0  # first tokens, exact, and their columns
    index: int = 0  # where the body's records are and which tokens they hold

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: "Held") -> "Held":
        return Held(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def human(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
