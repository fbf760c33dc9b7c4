"""Affine rounding written out in numpy, for tests to compare with."""

import numpy as np


def rounded(x, bits: int, clip: float = 1.0) -> np.ndarray:
    """Groups along the last axis: low = min, step = (max - min) / (2^bits - 1), float16; `clip` about the middle."""
    x = np.asarray(x, dtype=np.float32)
    out = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        group = x[at]
        middle, half = np.float32(group.max() + group.min()) / 2, np.float32(group.max() - group.min()) / 2 * clip
        low, step = np.float32(np.float16(middle - half)), np.float32(np.float16(2 * half / (2**bits - 1)))
        codes = np.zeros_like(group) if step == 0 else np.clip(np.rint((group - low) / step), 0, 2**bits - 1)
        out[at] = codes * step + low
    return out


def hadamard(size: int) -> np.ndarray:
    """Entry (i, j) is -1 to the number of ones that i and j share in binary, over sqrt(size)."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5
