"""Locret: a small network beside each layer scores a token from its query, key and value. arXiv 2410.01805

score = W2 gelu(W1 [q; k; v]), by KV head, trained while the model stays as it is: smooth L1 to how much the model needs
a token, plus .0025 times the squared difference of neighbouring scores. A score is known when the token comes, and
nothing later changes it: prompts come in chunks, as the paper's do.

Departures: the target is KVzip's score (attach/judging.py), as its logarithm, not the largest logit from an answer's
queries; rows are before RoPE, some 4,000 tokens of the calibration text, `steps` steps of 256 of them; the hidden width
is 256 by default (the paper: 1,024), and there are biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import gelu, smooth_l1_loss

from kvshrink.methods._evicting import Evicting
from kvshrink.methods._evidence import Evidence, Reduce
from kvshrink.methods._policy import Keeps, Scorer
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.methods._token_probe import Needed
from kvshrink.methods.evict.kvzap import agreement
from kvshrink.shapes import Float

SMOOTH, RATE, BATCH = 0.0025, 5e-4, 256


@final
@dataclass(frozen=True, eq=False)
class Scored(Scorer):
    """A network of two layers on [q; k; v] of each token by itself."""

    fitted: Fitted
    keeps: ClassVar[Keeps] = "own"
    reduce: ClassVar[Reduce | None] = None

    def importance(self, seen: Evidence) -> Float[Tensor, "b h t"]:
        b, h, _, _ = seen.keys.shape
        if seen.asked is None or "first" not in self.fitted:  # nothing is known: all alike
            return torch.zeros(b, h, seen.new, device=seen.keys.device)
        keys, values, at = seen.keys[:, :, -seen.new :], seen.values[:, :, -seen.new :], seen.positions[:, -seen.new :]
        asked = seen.asked
        if seen.undo is not None:
            keys, asked = seen.undo(keys, at), seen.undo(asked, at)
        return network(self.fitted, rows_of(asked, keys, values)).transpose(1, 2)


def rows_of(*parts: Float[Tensor, "b _ t d"]) -> Float[Tensor, "b t n"]:
    """Queries, keys and values of a token, one after the other."""
    return torch.cat([x.float().transpose(1, 2).flatten(2) for x in parts], 2)


def network(fitted: Fitted, rows: Float[Tensor, "*all n"]) -> Float[Tensor, "*all h"]:
    scaled = (rows - fitted["mean"]) / fitted["spread"]
    return gelu(scaled @ fitted["first"].T + fitted["first_bias"]) @ fitted["second"].T + fitted["second_bias"]


@final
@dataclass(frozen=True)
class Locret(Evicting):
    """`ratio` of the tokens behind the window, those that a trained network scores highest."""

    width: int = 256
    steps: int = 1000

    needs_fit: ClassVar[bool] = True

    def scorer(self, fitted: Fitted) -> Scorer:
        return Scored(fitted)

    def chooses_by(self, shape: LayerShape) -> Mapping[str, tuple[int, ...]]:
        inside = {"first": (self.width, -1), "first_bias": (self.width,), "mean": (-1,), "spread": (-1,)}
        return inside | {"second": (shape.heads, self.width), "second_bias": (shape.heads,)}

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
        found = {i: dict(layers[i]) | trained(needed[i], self.width, self.steps) for i in layers}
        known = {i: agreement(network(found[i], _rows(needed[i]).cpu()), needed[i].scores.cpu()) for i in layers}
        return found, {"agreement": [round(x, 3) for x in known.values()]}

    def check(self) -> None:
        super().check()
        require(self.width >= 1, f"width={self.width}", "Use at least 1.")
        require(self.steps >= 1, f"steps={self.steps}", "Use at least 1.")


def _rows(needed: Needed) -> Float[Tensor, "m n"]:
    return torch.cat([x.flatten(1) for x in (needed.queries, needed.keys, needed.values)], 1)


def trained(needed: Needed, width: int, steps: int) -> dict[str, Tensor]:
    """Tensors of one layer's network."""
    rows, wanted = _rows(needed).cpu(), needed.scores.log().cpu()
    draw = torch.Generator().manual_seed(0)
    fitted: dict[str, Tensor] = {
        "mean": rows.mean(0),
        "spread": rows.std(0).clamp_min(1e-6),
        "first": torch.randn(width, rows.shape[1], generator=draw) / rows.shape[1] ** 0.5,
        "first_bias": torch.zeros(width),
        "second": torch.randn(wanted.shape[1], width, generator=draw) / width**0.5,
        "second_bias": wanted.mean(0),
    }
    learnt = ["first", "first_bias", "second", "second_bias"]
    with torch.inference_mode(False), torch.enable_grad():
        fitted = {k: t.clone() for k, t in fitted.items()}
        rows, wanted = rows.clone(), wanted.clone()
        for name in learnt:
            fitted[name].requires_grad_(True)
        optimizer = torch.optim.AdamW([fitted[n] for n in learnt], lr=RATE, betas=(0.9, 0.95))
        for _ in range(steps):
            start = int(torch.randint(0, max(1, len(rows) - BATCH), (1,), generator=draw))
            own = slice(start, start + BATCH)  # neighbours, so that their scores are smooth
            guess = network(fitted, rows[own])
            loss = smooth_l1_loss(guess, wanted[own]) + SMOOTH * (guess[:-1] - guess[1:]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {k: t.detach().contiguous() for k, t in fitted.items()}


METHOD = Locret
