"""Fitting: what a method learns about a model from text, layer by layer, from activations that are never stored."""

from kvshrink.called import call_as
from kvshrink.fit.job import fit, fit_all

__all__ = ["fit", "fit_all"]

call_as(__name__, fit)
