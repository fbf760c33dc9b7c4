"""Rotary position embedding and its inverse. See reference.py."""

from kvshrink.kernels.rope.reference import rotate, wave_table, waves

__all__ = ["rotate", "wave_table", "waves"]
