"""Small integers packed without gaps. See reference.py for the format."""

from kvshrink.kernels.pack.reference import pack, pack_trits, packed_bytes, trit_bytes, unpack, unpack_trits

__all__ = ["pack", "pack_trits", "packed_bytes", "trit_bytes", "unpack", "unpack_trits"]
