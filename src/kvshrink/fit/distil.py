"""Train all layers' bases jointly on the model's own predictions: KL from the full cache's, as in MatryoshkaKV
(arXiv 2410.14731), where the prompt is prefilled exactly and its continuation reads what a cache would hold.

Half of the rows repeat a passage (see probe.py), the other half goes on with the text: on plain text alone little is
read from far back, on repetitions alone nothing else would count. Needs the whole model in memory.
Departures: KL alone, no cross-entropy to the text; any basis, not orthogonal ones; a basis for all heads of a layer.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from kvshrink.attach.families import LayerInfo
from kvshrink.fit.outputs import float32
from kvshrink.fit.reader import Reader
from kvshrink.fit.recall import REPEATED, recall_rows, row_length
from kvshrink.fit.train import Codecs, Loss, frozen, split
from kvshrink.methods._roles import Method
from kvshrink.shapes import Int


@final
class PredictionLoss(Loss):
    """Mean KL over the last quarter of a row."""

    def __init__(
        self, model: Any, infos: Sequence[LayerInfo], rows: Int[Tensor, "rows length"], method: Method
    ) -> None:
        self.reader = Reader(float32(model), infos, method)
        count, _ = split(len(rows))
        parts = []
        for part in (rows[:count], rows[count:]):
            length = row_length(self.reader.model, part)
            # every token about once, and at least one row of each kind
            parts.append(recall_rows(part, length, method, max(2, 2 * round(part.numel() / length / 2)), plain=True))
        self.trained, self.held = map(len, parts)
        device = next(model.parameters()).device
        self.rows = [row.to(device)[None] for part in parts for row in part]

    def __call__(self, codecs: Codecs, row: int) -> Tensor:
        ids = self.rows[row]
        tail = ids.shape[1] // REPEATED
        with torch.no_grad():
            exact = self.reader.prefill(ids[:, :-tail])
            wanted = self.reader.predict(exact, {}, ids[:, -tail:])
        with frozen(self.reader.model):
            found = self.reader.predict(exact, codecs, ids[:, -tail:])
        return (wanted.exp() * (wanted - found)).sum(-1).mean()
