"""Small integers packed without gaps. See reference.py for the format."""

from kvshrink.kernels.pack.reference import pack, packed_bytes, unpack

__all__ = ["pack", "packed_bytes", "unpack"]
