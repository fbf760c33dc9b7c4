"""ThinK: thinner keys, without the channels that queries hardly read. arXiv 2407.21018

Attention scores are sums over channels, and few channels carry them. Each head keeps the `keep` most
important channels, the others are not stored; values stay whole. Cheap to decode, as no basis is multiplied; weaker per
byte than a basis of its own, which puts what many channels share into few.

Departures from the paper, with the squared error of centred scores over their variance (reference model, 4 held-out
prompts of 3,968 tokens, read by the 128 queries behind them, keep 0.5). Channels are chosen once, from calibration
text, not for each prompt from its last queries, since no query reaches the cache and a page is encoded once: .039, not
.038. Whole RoPE pairs are kept, so that keys may be pruned before or after RoPE alike: .038, not .023. A channel left
out reads as its calibrated mean, `fill="zero"` is the paper's: .039, not .053. The paper itself, with none of these:
.040. With `bits` keys are quantised before RoPE, unless `fill="zero"`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._stats import CalibrationStats, LayerShape
from kvshrink.methods.lowrank import _channels


@final
@dataclass(frozen=True)
class ThinK(Method):
    """Pruned key channels.

    keep:   share of the key channels in every head (the paper's 1 - ratio: 0.6 and 0.5).
    bits:   bits of a stored number, keys and values: None (the model's dtype), 8, 4, 3 or 2 (KIVI's axes).
    fill:   what a channel reads as that is left out: "mean" (of calibration text, before RoPE) or "zero".
    scores: importance of a channel: "calibrated" (energy of queries x keys, the paper's norms squared), or "magnitude"
            (keys alone, which the paper compares with).
    """

    keep: float = 0.5
    bits: int | None = None
    fill: Literal["mean", "zero"] = "mean"
    scores: Literal["calibrated", "magnitude"] = "calibrated"

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"

    def check(self) -> None:
        super().check()
        _channels.check(self.keep, self.bits)

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return [kept / shape.head_dim for kept in range(2, shape.head_dim + 1, 2)]

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        d = stats.shape.head_dim
        room = _channels.count(self.keep, d)
        importance = _channels.importance(stats, self.fill, self.scores == "calibrated").tolist()
        partner = _channels.partners(stats).tolist()
        whole = _channels.units(importance, partner, range(len(importance)))
        heads = [[unit for unit in whole if unit[1][0] // d == head] for head in range(stats.shape.heads)]
        kept = sorted(c for head in heads for c in _channels.best(head, room))
        fill = _channels.fills(stats, self.fill)
        return {"key_kept": torch.tensor(kept, device=fill.device), "key_fill": fill}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return _channels.codecs(shape, fitted, self.page, self.bits, self.fill)

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The same before a fit and after it."""
        kept = shape.heads * _channels.count(self.keep, shape.head_dim)
        return sum(p.page_bytes() for p in _channels.packings(shape, kept, self.page, self.bits)) * 8 / self.page


METHOD = ThinK
