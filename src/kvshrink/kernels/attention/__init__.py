"""Attention over one block of keys at a time, and the merge of segments. See reference.py."""

from kvshrink.kernels.attention.reference import Running, finish, fold, join, merge, start

__all__ = ["Running", "finish", "fold", "join", "merge", "start"]
