"""A randomised Hadamard rotation: it makes channels of one scale alike, so that an outlier is no channel's alone.

Orthogonal, so it folds into a basis and costs nothing at run time (QuaRot, arXiv 2404.00456). A size that is no power
of two is rotated in blocks that are.
"""

from functools import cache

import torch
from torch import Tensor

from kvshrink.shapes import Float

SEED = 0


@cache
def rotation(size: int) -> Float[Tensor, "size size"]:
    """Orthogonal, the same at every call: signs times a Hadamard matrix, float32."""
    generator, blocks = torch.Generator().manual_seed(SEED), []
    for block in _blocks(size, size):
        signs = torch.randint(0, 2, (block,), generator=generator) * 2.0 - 1.0
        blocks.append(signs[:, None] * _plain(block) / block**0.5)
    found: Tensor = torch.block_diag(*blocks)
    return found


@cache
def hadamard(size: int, most: int) -> Float[Tensor, "size size"]:
    """Orthogonal, without signs, in blocks of at most `most`."""
    found: Tensor = torch.block_diag(*(_plain(block) / block**0.5 for block in _blocks(size, most)))
    return found


def _blocks(size: int, most: int) -> list[int]:
    """Powers of two, at most `most`, that make up a size, the largest first."""
    found = []
    while size:
        found.append(2 ** (min(size, most).bit_length() - 1))
        size -= found[-1]
    return found


def _plain(size: int) -> Tensor:
    """Entries 1 and -1; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
