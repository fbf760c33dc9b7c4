"""Affine quantisation with a float minimum. See reference.py for the formula."""

from kvshrink.kernels.affine.reference import dequantize, quantize

__all__ = ["dequantize", "quantize"]
