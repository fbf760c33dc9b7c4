"""What a codec or a packing may be able to do beyond its role, each a small role that is asked for by type.

A wrapper has the abilities of what it wraps, unless it has one by itself or names it among those it `drops`.
"""

from typing import Any, TypeVar

from kvshrink.methods._packing.base import MovesSlots as MovesSlots

Ability = TypeVar("Ability")


def find(thing: Any, ability: "type[Ability]") -> Ability | None:
    """What has the ability: the thing, or what it wraps. None: neither has."""
    while thing is not None:
        if ability in getattr(thing, "drops", ()):
            return None
        if isinstance(thing, ability):
            return thing
        thing = getattr(thing, "packing", None) or getattr(thing, "inner", None)
    return None
