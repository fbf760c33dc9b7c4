"""Decode attention over stored pages in one operation. See reference.py for what it means."""

from kvshrink.kernels.decode.reference import Basis, Turn, decode

__all__ = ["Basis", "Turn", "decode"]
