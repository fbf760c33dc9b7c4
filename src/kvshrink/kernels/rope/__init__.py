"""Rotary position embedding and its inverse. See reference.py."""

from kvshrink.kernels.rope.reference import rotate

__all__ = ["rotate"]
