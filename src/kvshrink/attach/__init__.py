"""Model -> attention hook: what makes a transformers model read and write our cache."""

from kvshrink.attach.factory import make_cache
from kvshrink.attach.hook import attach, attached, detach
from kvshrink.called import call_as

__all__ = ["attach", "attached", "detach", "make_cache"]

call_as(__name__, attach)
