"""KVzap: what a model would need of a token if it read the text again, guessed from the token alone. arXiv 2601.07891

`fit` lets the model read calibration text again (KVzip, attach/judging.py) and learns, for each KV head, a linear map
from a layer's input to the logarithm of the score, in closed form. A token's importance is known when it comes, and
what comes later changes nothing: prefixes may be shared, and prompts come in chunks.

threshold=None: the share `ratio` of the calibration text's tokens is above one threshold for all layers and heads,
found by the fit: a text that needs more holds more. A number: that logarithm itself, as the paper's -3 to -9.

Departures: linear, not the paper's two layers too; ridge regression on some 4,000 tokens, not gradient descent on a
million; scores are KVzip's, not KVzip+'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink.methods._budgets import Budget, Threshold
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.shapes import Float

RIDGE = 1e-2  # of the mean square of an input channel


@final
@dataclass(frozen=True, eq=False)
class Guessed(Scorer):
    """A linear map of the layer's input."""

    fitted: Fitted
    ratio: float
    keeps: ClassVar[Keeps] = "own"
    asks: ClassVar[bool] = False
    hidden: ClassVar[bool] = True

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        if seen.hidden is None or "weight" not in self.fitted:  # nothing is known: some are above the threshold
            draw, least = torch.Generator().manual_seed(0), float(self.fitted.get("least", torch.zeros(())))
            random = torch.rand(*seen.keys.shape[:2], seen.new, generator=draw)
            return (random - (1 - self.ratio) + least).to(seen.keys.device)
        guess = seen.hidden.float() @ self.fitted["weight"].T + self.fitted["bias"]
        return guess.transpose(1, 2)


@final
@dataclass(frozen=True)
class KVzap(Evicting):
    """The tokens behind the window that are guessed to be needed, about `ratio` of them over all layers and heads."""

    threshold: float | None = None

    needs_fit: ClassVar[bool] = True
    counted_by: ClassVar[str | None] = "a threshold"

    def scorer(self, fitted: Fitted) -> Scorer:
        return Guessed(fitted, self.ratio)

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        least = self.threshold
        if least is None and "least" in fitted:
            least = float(fitted["least"])
        return Threshold(ratio, 0.0 if least is None else least)

    def chooses_by(self, shape: LayerShape) -> Mapping[str, tuple[int, ...]]:
        return {"weight": (shape.heads, -1), "bias": (shape.heads,), "least": ()}

    @property
    def probes(self) -> bool:
        return True

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        return {}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        assert probe is not None
        needed = probe.tokens.needed()
        found, guesses, known = {}, [], []
        for i in layers:
            weight, bias = ridge(needed[i].hidden, needed[i].scores.log())
            guess = needed[i].hidden @ weight.T + bias
            guesses.append(guess.flatten())
            known.append(agreement(guess, needed[i].scores))
            found[i] = dict(layers[i]) | {"weight": weight, "bias": bias}
        least = quantile(torch.cat(guesses), 1 - self.ratio)
        done = {
            i: {k: t.cpu().contiguous() for k, t in own.items()} | {"least": least.cpu()} for i, own in found.items()
        }
        return done, {"least": float(least), "agreement": [round(x, 3) for x in known]}


def ridge(rows: Float[Tensor, "m n"], wanted: Float[Tensor, "m h"]) -> tuple[Float[Tensor, "h n"], Float[Tensor, " h"]]:
    """Weights and biases of the best linear map."""
    mean, middle = rows.double().mean(0), wanted.double().mean(0)
    x, y = rows.double() - mean, wanted.double() - middle
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.float(), (middle - weight @ mean).float()


def quantile(values: Float[Tensor, " m"], share: float) -> Float[Tensor, ""]:
    """As torch's, of any number of values."""
    return values.sort().values[min(len(values) - 1, round(share * len(values)))]


def agreement(guess: Float[Tensor, "m h"], scores: Float[Tensor, "m h"]) -> float:
    """Rank correlation, the mean over heads."""
    a, b = (x.argsort(0).argsort(0).double() for x in (guess, scores))
    a, b = a - a.mean(0), b - b.mean(0)
    return float(((a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt().clamp_min(1e-30)).mean())


METHOD = KVzap
