"""How rows of numbers lie in a page, one form a file: the last step of every method that stores tokens.

Input and output are rows [b, G, t, r] of whole pages; what is stored is [b, p, ...]. `load(store(x))` is the rounded x,
bit for bit what `fake_quantize(x)` says, and pages do not depend on each other.
"""

from kvshrink.methods._packing.affine import Affine, packing
from kvshrink.methods._packing.base import METADATA_BYTES, Packing
from kvshrink.methods._packing.codebook import Codebook
from kvshrink.methods._packing.planes import Planes
from kvshrink.methods._packing.raw import Raw
from kvshrink.methods._packing.salient import Salient
from kvshrink.methods._packing.separable import Separable

__all__ = [
    "METADATA_BYTES",
    "Affine",
    "Codebook",
    "Packing",
    "Planes",
    "Raw",
    "Salient",
    "Separable",
    "packing",
]
