"""Quantisation of unit normal numbers by the levels of least error. See reference.py."""

from kvshrink.kernels.normal.reference import from_codes, to_codes

__all__ = ["from_codes", "to_codes"]
