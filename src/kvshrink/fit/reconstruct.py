"""CSKV's own loss (arXiv 2409.10593, 3.3): how well the factors of one layer rebuild its keys and values.

Teacher-forced and layer by layer: the targets are the original keys and values, so layers are independent. The loss is
the mean squared error of both (before RoPE, which is orthogonal). Departure: the encoder acts on the key (n x r), not
on the layer input (hidden x r); the optimum is the same, as a key that is rebuilt from x is rebuilt from the key alone.
"""

from typing import final

import torch
from torch import Tensor

from kvshrink.fit.train import Codecs, Loss, split
from kvshrink.shapes import Float


@final
class RowLoss(Loss):
    """Mean squared error of one layer's keys before RoPE and values; one calibration row a step, as in the paper."""

    def __init__(self, keys: Float[Tensor, "rows h t d"], values: Float[Tensor, "rows h t d"], page: int) -> None:
        usable = keys.shape[2] // page * page
        self.rows = (keys[:, :, :usable], values[:, :, :usable])
        self.trained, self.held = split(len(keys))

    def __call__(self, codecs: Codecs, row: int) -> Tensor:
        (pair,) = codecs.values()
        errors = []
        for codec, all_rows in zip(pair, self.rows, strict=True):
            rows = all_rows[row : row + 1].float()
            errors.append((codec.decode(codec.encode(rows, None), rows.shape[1]) - rows).square().mean())
        return torch.stack(errors).sum()
