"""JSON that comes in, within bounds: whatever the text is, the answer is plain values or one ValueError.

Bounds are checked before a value is made where they are about memory: a text of a hundred brackets a kilobyte takes
fifty times its size once it is read. No list nests deeper than our own files do, no number exceeds what a machine
holds, no key comes twice, and every text can be printed.
"""

import json
import math
from typing import Any

DEEPEST = 32
VALUES = 2**20  # in one file
LARGEST = 2**63  # no honest number is beyond


def parsed(data: bytes | str, values: int = VALUES, finite: bool = True) -> Any:
    """What JSON text holds. Raises ValueError, in one line, on anything that we would not have written.

    finite: whether numbers must be; Python writes NaN and Infinity, which JSON does not have.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    if sum(map(text.count, "[{,")) > values:
        raise ValueError(f"more than {values} values")
    try:
        found = json.loads(text, parse_constant=_constant if finite else None, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("lists or objects nest too deep") from error
    _check(found, finite)
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:40]!r} comes twice")
        found[name] = value
    return found


def _check(value: Any, finite: bool) -> None:
    """Raise ValueError if something in it is deeper, larger or stranger than it may be."""
    level = [value]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for x in level:
            if isinstance(x, dict):
                deeper += x
                deeper += x.values()
            elif isinstance(x, list):
                deeper += x
            elif isinstance(x, str):
                if not x.isascii():
                    x.encode()  # half a pair of surrogates has no bytes
            elif isinstance(x, float) and finite and not math.isfinite(x):
                raise ValueError("a number is infinite")
            elif isinstance(x, int) and not -LARGEST <= x < LARGEST:
                raise ValueError("a number is beyond 64 bits")
        if not deeper:
            return
        level = deeper
    raise ValueError("lists or objects nest too deep")
