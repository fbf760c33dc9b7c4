"""Whether a cache is used with the model that it was made for: looked at when a turn begins, not at every token."""

import weakref
from typing import Any

from kvshrink.attach.glance import Glance
from kvshrink.attach.identity import identity_of
from kvshrink.cache.cache import KVCache
from kvshrink.cache.owner import Owner
from kvshrink.errors import CacheError
from kvshrink.identity import Identity


def owner_of(decoder: Any, identity: Identity) -> Owner:
    """The owner of a new cache."""
    return Owner(identity, weakref.ref(decoder), Glance(decoder), identity_of)


def check_owner(decoder: Any, name: str, cache: KVCache, new: int) -> None:
    """Raise CacheError if the decoder that is about to read `new` tokens is not what the cache was made for.

    name: of the decoder's attachment. A single token behind others costs nothing: the model is taken to be the same.
    """
    owner, seen = cache.owner, cache.get_seq_length()
    if owner is None:
        return
    known = owner.decoder() is decoder and cache.model == name
    if known and new == 1 and seen:
        return
    glance = Glance(decoder)
    if known and glance.same(owner.seen):
        return
    now = identity_of(decoder)
    if different := owner.identity.difference(now):
        if not known:
            raise CacheError(
                f"this cache was made for another model: of this one {different}. Make one with make_cache(model, ...)."
            )
        if seen or cache.method.needs_fit:
            raise CacheError(
                f"the model has changed since this cache was made: {different}. Make one with make_cache(model, ...)."
            )
        owner.identity = now  # nothing was stored or learnt with what it was
    owner.decoder, owner.seen, cache.model = weakref.ref(decoder), glance, name
