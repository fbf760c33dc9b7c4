"""The numbers of stored pages, in the four forms that codecs store them in. See reference.py."""

from kvshrink.kernels.latents.reference import Packed, load

__all__ = ["Packed", "load"]
