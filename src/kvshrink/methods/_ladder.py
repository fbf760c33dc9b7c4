"""Packings by age: how rows are stored while they are young, and what older pages keep of that."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvshrink.kernels.records import record_bytes
from kvshrink.methods._packing import Packing
from kvshrink.methods._tier import Tier

Ladder = tuple[tuple[Packing | None, int | None], ...]  # (packing or None: dropped, tokens at most or None) by age


def aged(pair: tuple[Any, Any], key: Ladder, value: Ladder) -> tuple[Tier, ...]:
    """Tiers of the youngest pages' codecs, with the packings of each age. Tensors of a basis are shared."""
    found = [Tier(pair, key[0][1])]
    for (of_keys, tokens), (of_values, _) in zip(key[1:], value[1:], strict=True):
        dropped = of_keys is None or of_values is None
        older = None if dropped else (replace(pair[0], packing=of_keys), replace(pair[1], packing=of_values))
        found.append(Tier(older, tokens))
    return tuple(found)


def held(ladders: Sequence[Ladder], pages: int, page: int) -> int:
    """Bytes of so many pages, the youngest tier filled first."""
    total = 0
    for (of_keys, tokens), (of_values, _) in zip(*ladders, strict=True):
        count = pages if tokens is None else min(pages, tokens // page)
        pages -= count
        total += count * record_bytes(sum(x.page_bytes() for x in (of_keys, of_values) if x is not None))
    return total
