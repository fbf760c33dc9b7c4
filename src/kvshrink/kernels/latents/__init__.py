"""The numbers of stored pages, in the four forms that codecs store them in. See reference.py."""

from kvshrink.kernels.latents.reference import MIXED, Packed, code_of, level_table, load

__all__ = ["MIXED", "Packed", "code_of", "level_table", "load"]
