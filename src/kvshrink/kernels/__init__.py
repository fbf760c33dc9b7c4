"""Kernels: one folder per op. `reference.py` is the op's meaning, in plain torch; faster files must agree with it."""
