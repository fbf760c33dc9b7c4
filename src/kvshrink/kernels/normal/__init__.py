"""Quantisation of unit normal numbers by the levels of least error. See reference.py."""

from kvshrink.kernels.normal.reference import expected_error, from_codes, levels, to_codes

__all__ = ["expected_error", "from_codes", "levels", "to_codes"]
