"""MoA: each head sees a span of recent tokens that grows with the text by a rule of its own. arXiv 2406.14909

A rule is least + share x tokens. `fit` measures what each rule costs each head, to first order, on texts of three
lengths (fit/spans.py), and takes the rules that cost least within `ratio` of all tokens at every length: an integer
program, solved by scipy.

Departures: costs are of texts of up to 1,024 tokens, with passages of calibration text that come again, not of answers
that the model wrote; one program over all lengths, not a Pareto front that is validated at a longer one; rules are for
KV heads; a prefill is the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.methods._budgets import Budget, ByHead, Uniform
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._policy import Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.methods._token_probe import Rule
from kvshrink.methods.evict.duo_attention import Recent

LEAST, SHARES = (64, 128, 256), (0.0, 0.125, 0.25, 0.5, 1.0)
RULES = tuple(Rule(least, share) for share in SHARES for least in (LEAST if share < 1 else (0,)))


@final
@dataclass(frozen=True)
class MoA(Evicting):
    """ratio: share of all tokens that heads see in the mean. sinks: first tokens that every head sees."""

    sinks: int = 64
    ratio: float = 0.5

    needs_fit: ClassVar[bool] = True
    counted_by: ClassVar[str | None] = "spans"
    by_class: ClassVar[bool] = True

    def scorer(self, fitted: Fitted) -> Scorer:
        return Recent()

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        spans = fitted.get("spans")
        if spans is None:
            return Uniform(ratio)
        rules = [Rule(int(a), float(b)) for a, b in spans.tolist()]
        # the window is a part of the span, and of what is behind it a head keeps the rest
        behind = tuple(max(0, r.least - round(self.window * (1 - r.share))) for r in rules)
        return ByHead(tuple(r.share for r in rules), behind)

    def chooses_by(self, shape: LayerShape) -> Mapping[str, tuple[int, ...]]:
        return {"spans": (shape.heads, 2)}

    @property
    def probes(self) -> bool:
        return True

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        return {}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        assert probe is not None
        lengths, costs = probe.tokens.spans(RULES, self.sinks)
        every = torch.cat([costs[i] for i in layers], 2)  # [n, r, heads]
        chosen = solve(every.sum(0).double().numpy(), RULES, lengths, self.ratio)
        spans = torch.tensor([RULES[r] for r in chosen])
        parts = dict(zip(layers, spans.split([costs[i].shape[2] for i in layers]), strict=True))
        found = {i: dict(layers[i]) | {"spans": parts[i].clone()} for i in layers}
        return found, {"spans": {str(i): parts[i].tolist() for i in layers}, "lengths": lengths}


def solve(cost: np.ndarray, rules: Sequence[Rule], lengths: Sequence[int], ratio: float) -> list[int]:
    """The rule of each head, [r, heads], with the least cost in all, within `ratio` of the tokens at each length in the
    mean of all heads. Raises SettingError if no rules are."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, heads = cost.shape
    cost = cost.clip(0)  # that a head gains by seeing less is noise of the first order
    one_each = LinearConstraint(np.tile(np.eye(heads), count), 1, 1)
    seen = [LinearConstraint(np.repeat([r.span(n) / n for r in rules], heads) / heads, 0, ratio) for n in lengths]
    wide = np.array([np.mean([r.span(n) / n for n in lengths]) for r in rules])
    ties = 1e-6 * wide[:, None]  # of rules that cost as much the widest
    found = milp(
        (cost / (cost.max() or 1.0) - ties).ravel(),
        constraints=[one_each, *seen],
        integrality=np.ones(count * heads),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        least = max(min(r.span(n) for r in rules) / n for n in lengths)
        raise SettingError(f"ratio={ratio} is less than any rule sees of {lengths[0]} tokens. Use {least:.2f} or more.")
    return [int(r) for r in found.x.reshape(count, heads).argmax(0)]


METHOD = MoA
