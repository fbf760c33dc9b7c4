"""Scores of a few queries with stored keys. See reference.py."""

from kvshrink.kernels.scores.reference import scores as scores
