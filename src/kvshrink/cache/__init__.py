"""The cache: layers of [sinks | body | window], attention over them, and what a user asks of a cache."""

from kvshrink.cache.cache import KVCache

__all__ = ["KVCache"]
