"""What lossy keys and values do to the output of their own layer, to train on: StiefAttention (arXiv 2601.21686).

The first half of a row is read through the codecs, the second half exactly, by exact queries; the loss is the relative
squared error of the second half after the output projection. Layer by layer, inputs as the exact model has them.
Departures: the attention output, not the decoder layer's (no MLP); any basis, not orthonormal ones only.
"""

import copy
from typing import final

import torch
from torch import Tensor

from kvshrink.attach.families import LayerInfo
from kvshrink.fit.allocate import Lossy
from kvshrink.fit.train import Codecs, Loss, frozen, split
from kvshrink.store.plain import is_plain


@final
class OutputLoss(Loss):
    """inputs: keyword arguments of the attention module for all calibration batches, in order."""

    def __init__(self, info: LayerInfo, inputs: list[dict], page: int) -> None:
        self.rope, self.page = info.rope, page
        self.module, self.rows = float32(info.module), [row for kwargs in inputs for row in _rows(kwargs)]
        self.trained, self.held = split(len(self.rows))
        self.exact: dict[int, Tensor] = {}

    def __call__(self, codecs: Codecs, row: int) -> Tensor:
        (pair,) = codecs.values()
        if row not in self.exact:
            with torch.no_grad():
                self.exact[row] = self._tail(row, None)
        exact = self.exact[row]
        with frozen(self.module):
            lossy = self._tail(row, Lossy(pair, self.rope, self.page))
        return (lossy - exact).square().sum() / exact.square().sum()

    def _tail(self, row: int, cache: Lossy | None) -> Tensor:
        kwargs = {k: _float(v) for k, v in self.rows[row].items()}
        output = self.module(**kwargs, past_key_values=cache)[0]
        return output[:, output.shape[1] // 2 :]


def float32(module):
    """The module itself if it computes in float32 or in codes of its own, else a copy of it that does."""
    parameters = list(module.parameters())
    coded = any(not is_plain(p) or not p.is_floating_point() for p in parameters)
    if coded or all(p.dtype == torch.float32 for p in parameters):
        return module
    return copy.deepcopy(module).float()


def _rows(kwargs: dict) -> list[dict]:
    """The arguments of each row of a batch: what has one entry per row is taken apart, the rest is shared."""
    b = kwargs["hidden_states"].shape[0]
    plain = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
    return [{k: _row(v, b, i) for k, v in plain.items()} for i in range(b)]


def _row(value, b: int, i: int):
    if isinstance(value, tuple | list):
        return type(value)(_row(v, b, i) for v in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == b:
        return value[i : i + 1]
    return value


def _float(value):
    if isinstance(value, tuple | list):
        return type(value)(_float(v) for v in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
