"""DuoAttention: some heads need the whole text, the others the first and the recent tokens. arXiv 2410.10819

`fit` trains a gate for each KV head between full and streaming attention (fit/gates.py); over all layers the share
`ratio` of heads with the largest gates keeps everything, the others hold `sinks` and `recent` tokens, whatever the
length.

Departures: the gates are trained on passages of the calibration text that come again, not on passkeys, in `steps` steps
of 1,024 tokens (the paper: 2,000 of up to 128k), so that a fit takes minutes; heads are not reordered, and sinks and
window are held by all of them; a prefill is the model's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._budgets import Budget, ByHead, Classes
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.shapes import Float

WHOLE = "whole"  # which of a layer's heads keep everything


@final
class Recent(Scorer):
    """The later a token, the more important."""

    keeps: ClassVar[Keeps] = "own"
    asks: ClassVar[bool] = False

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        new = seen.counted[:, -seen.new :].float()
        return new[:, None].expand(-1, seen.keys.shape[1], -1).contiguous()


@final
@dataclass(frozen=True)
class DuoAttention(Evicting):
    """ratio: share of heads that keep everything. sinks, recent: tokens of the others."""

    sinks: int = 64
    ratio: float = 0.5
    recent: int = 256
    steps: int = 100

    needs_fit: ClassVar[bool] = True
    counted_by: ClassVar[str | None] = "heads of two classes"
    by_class: ClassVar[bool] = True

    def scorer(self, fitted: Fitted) -> Scorer:
        return Recent()

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        kept = max(0, self.recent - self.window)
        whole = fitted.get(WHOLE)
        if whole is None:
            return Classes(ratio, kept)
        flags = [bool(x) for x in whole.tolist()]
        return ByHead(tuple(1.0 if x else 0.0 for x in flags), tuple(0 if x else kept for x in flags))

    def chooses_by(self, shape: LayerShape) -> Mapping[str, tuple[int, ...]]:
        return {WHOLE: (shape.heads,)}

    @property
    def probes(self) -> bool:
        return True

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        return {}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        assert probe is not None
        gates = probe.tokens.gates(self.sinks, self.recent, self.steps)
        every = torch.cat([gates[i] for i in layers])
        count = max(1, round(self.ratio * len(every)))
        best = torch.zeros(len(every), dtype=torch.uint8)
        best[every.argsort(descending=True, stable=True)[:count]] = 1
        whole = dict(zip(layers, best.split([len(gates[i]) for i in layers]), strict=True))
        found = {i: dict(layers[i]) | {WHOLE: whole[i].clone()} for i in layers}
        return found, {"gates": {str(i): [round(x, 3) for x in gates[i].tolist()] for i in layers}}

    def check(self) -> None:
        super().check()
        require(self.recent >= self.window, f"recent={self.recent}", f"The window of {self.window} is part of it.")
        require(self.steps >= 1, f"steps={self.steps}", "Use at least 1.")


METHOD = DuoAttention
