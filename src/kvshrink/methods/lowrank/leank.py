"""LeanK: one static mask of key channels for the whole model. arXiv 2508.02215

Some heads live on a few slow channels and others on many, so channels of all heads and layers compete for one budget.
A layer, and a head, keeps as many as its importance allows; values stay whole.

Departures from the paper: the mask is not trained (the paper learns scales of the channels against the model's output,
then a mask, on long retrieval prompts) but chosen in closed form by ThinK's importance of a channel (arXiv 2407.21018);
heads keep any number of RoPE pairs, not multiples of a kernel's tile; the paper's smaller
saving of values is left out; a channel left out reads as its calibrated mean (`fill="zero"`: the paper's).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.methods.lowrank import _channels


@final
@dataclass(frozen=True)
class LeanK(Method):
    """Key channels pruned by one mask, over all heads and layers.

    keep: share of the key channels, over all layers (the paper's 1 - ratio: 0.3).
    bits: bits of a stored number, keys and values: None (the model's dtype), 8, 4, 3 or 2 (KIVI's axes).
    fill: what a channel reads as that is left out: "mean" (of calibration text, before RoPE) or "zero".
    """

    keep: float = 0.5
    bits: int | None = None
    fill: Literal["mean", "zero"] = "mean"

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"

    def check(self) -> None:
        super().check()
        _channels.check(self.keep, self.bits)

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return [kept / shape.width for kept in range(2, shape.width + 1, 2)]

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """Importance of channels, and the mask of this layer by itself."""
        importance, partner = _channels.importance(stats, self.fill), _channels.partners(stats)
        whole = _channels.units(importance.tolist(), partner.tolist(), range(len(importance)))
        kept = sorted(_channels.best(whole, _channels.count(self.keep, len(importance))))
        return {
            "key_kept": torch.tensor(kept, device=importance.device),
            "key_fill": _channels.fills(stats, self.fill),
            "key_importance": importance,
            "key_partner": partner,
        }

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        """The channels of all layers under one budget; a layer may be left without any.

        The error of a score has one unit in all layers. As a share of each layer's scores (on the reference model, 4
        texts of 4,096 tokens) KL rose from .0075 to .0104 at keep 0.5 and from .0133 to .0166 at 0.25.
        """
        room = sum(len(x["key_kept"]) for x in layers.values())
        whole = [
            unit
            for i, x in layers.items()
            for unit in _channels.units(
                x["key_importance"].tolist(), x["key_partner"].tolist(), [(i, c) for c in range(shapes[i].width)]
            )
        ]
        kept = sorted(_channels.best(whole, room))
        done = {}
        for i, x in layers.items():
            mine = torch.tensor([c for layer, c in kept if layer == i], dtype=torch.long, device=x["key_kept"].device)
            rest = {name: t for name, t in x.items() if name not in ("key_importance", "key_partner")}
            done[i] = {**rest, "key_kept": mine}
        return done, {"key_channels": {str(i): len(x["key_kept"]) for i, x in done.items()}}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return _channels.codecs(shape, fitted, self.page, self.bits, self.fill)

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """Of an average layer where nothing is fitted yet: all layers together keep exactly that."""
        kept = len(fitted["key_kept"]) if fitted else _channels.count(self.keep, shape.width)
        return sum(p.page_bytes() for p in _channels.packings(shape, kept, self.page, self.bits)) * 8 / self.page


METHOD = LeanK
