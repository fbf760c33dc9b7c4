"""Spectral bits: every latent channel gets the bits that its variance is worth, under one byte budget.

Rank and bits are one question: a channel left out is a channel of 0 bits. Channels of a layer's keys (before RoPE) and
values are ordered by variance, in groups of 16; each group has a width of its own; the bytes are shared between layers,
keys and values by what a loss there costs the model, measured as KL on repeated passages. Keys are rebuilt a block at a
time and values stay latent, as in CSKV (arXiv 2409.10593); nothing is ever held at full width.

Sources: transform and adaptive bits as in KVTC's storage codec (arXiv 2511.01815); the Lloyd-Max codes of rotated, unit
numbers as in TurboQuant (arXiv 2504.19874). Departures: the store is resident and attended over; one gain per page and
group, none per token; allocation by measured KL instead of mean squared error.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.methods._facts import LayerFacts, LayerShape, Probe
from kvshrink.methods._packing.mixed import Mixed, group_bytes
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._rotate import rotation
from kvshrink.methods._settings import require
from kvshrink.methods.lowrank import _bits
from kvshrink.methods.lowrank._basis import BasisCodec, metrics_of, spectrum

SIDES = ("key", "value")
GROUP = 16  # channels that share a width and a gain
POINTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # bits a channel at which a loss is measured
NOTHING = 1e-4  # nats of KL: less is the noise of bfloat16, and finer points are not measured
FLOOR = 1e-20  # a direction without variance has no scale of its own


@final
@dataclass(frozen=True)
class Spectral(Method):
    """Latents of keys and values with the bits that they are worth.

    budget:     bytes of the body over the full cache's, gains included, window and sinks not; over all layers.
    widths:     widths that a group of 16 channels may have, beside 0.
    allocation: how bytes are shared between layers, keys and values: "kl" (measured on the whole model, which must
                be in memory), "energy" (relative squared error, needs no model), "uniform" (the same for each).
    rotate:     Hadamard-rotate the channels of one width (folded into the basis): outliers are spread.
    key_metric, value_metric: as CSKV's.
    """

    budget: float = 0.0625
    widths: tuple[int, ...] = (1, 2, 3, 4, 8)
    allocation: Literal["kl", "energy", "uniform"] = "kl"
    rotate: bool = True
    key_metric: Literal["plain", "query"] = "plain"
    value_metric: Literal["plain", "output"] = "plain"

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "budget"

    def check(self) -> None:
        super().check()
        require(0 < self.budget <= 1, f"budget={self.budget}", "Use a share of bytes above 0, up to 1.")
        ok = bool(self.widths) and all(w in (1, 2, 3, 4, 8) for w in self.widths)
        require(ok, f"widths={self.widths}", "Use some of 1, 2, 3, 4, 8.")

    @property
    def probes(self) -> bool:
        return self.allocation == "kl"

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        """From one group of channels a layer on, which `finish` can always give, in steps of a ten-thousandth."""
        page = shape.token_bytes * self.page
        least = group_bytes(group_sizes(shape.width)[0], min(self.widths), self.page) / page
        most = min(1.0, self._most(shape) / page)
        return [k / 10_000 for k in range(math.ceil(10_000 * least), int(10_000 * most) + 1)]

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The budget, which all layers together keep to, where nothing is fitted yet."""
        if fitted:
            return super().bits_per_token(shape, fitted)
        return self._budget(shape) * 8 / self.page

    def fit_layer(self, facts: LayerFacts) -> dict[str, Tensor]:
        """All directions of one layer, and widths for this layer by itself."""
        metrics = metrics_of(self, facts)
        out: dict[str, Tensor] = {}
        for side, moments, metric in zip(SIDES, (facts.key, facts.value), metrics, strict=True):
            variance, down, up = spectrum(moments.covariance, 1, facts.shape.width, metric)
            out |= {f"{side}_up": up, f"{side}_variance": variance[0], f"{side}_mean": moments.mean[None]}
            if metric is not None:
                out[f"{side}_down"] = down
        out = {k: t.float().contiguous() for k, t in out.items()}
        given = _bits.share(
            {side: [p[::2] for p in self._points(out, side)] for side in SIDES}, self._budget(facts.shape)
        )
        return out | {f"{side}_widths": self._widths(out, side, given[side]) for side in SIDES}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict]:
        """Share the budget between the sides of all layers, and keep the directions that got bits."""
        budget = sum(self._budget(shapes[i]) for i in layers)
        sides = [(i, side) for i in layers for side in SIDES]
        curves: dict[tuple[int, str], _bits.Curve] = {}
        if self.allocation == "kl":
            assert probe is not None
            curves = {(i, s): self._by_kl(layers[i], i, s, shapes[i], probe) for i, s in sides}
        elif self.allocation == "energy":
            curves = {(i, s): [p[::2] for p in self._points(layers[i], s)] for i, s in sides}
        given = _bits.share(curves, budget) if curves else {at: budget // len(sides) for at in sides}
        widths, left = {}, budget - sum(given.values())
        for i, side in sorted(sides, key=lambda at: -given[at]):  # what one side cannot use up, the next may
            widths[i, side] = self._widths(layers[i], side, given[i, side] + left)
            left += given[i, side] - _bits.cost_of(widths[i, side].tolist(), group_sizes(shapes[i].width), self.page)
        if not any(bool(w.any()) for w in widths.values()):
            shape = next(iter(shapes.values()))
            group = group_bytes(min(group_sizes(shape.width)), min(self.widths), self.page)
            least = math.ceil(1e5 * group / sum(shapes[i].token_bytes * self.page for i in layers)) / 1e5
            raise SettingError(f"budget={self.budget} is less than one group of channels takes. Use {least:g} or more.")
        done = {}
        for i in layers:
            chosen = {f"{side}_widths": widths[i, side] for side in SIDES}
            done[i] = trimmed(trimmed({**layers[i], **chosen}, "key"), "value")
        for (i, side), curve in curves.items():
            done[i][f"{side}_curve"] = torch.tensor(curve, dtype=torch.float64)
        named = {f"{i} {side}": w.tolist() for (i, side), w in sorted(widths.items())}
        errors = {i: {f"{side}_error": self._error(layers[i], side, widths[i, side]) for side in SIDES} for i in layers}
        return done, {"widths": named, "unspent": left / max(1, budget), "layers": errors}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def _budget(self, shape: LayerShape) -> int:
        """Bytes of a layer's page, keys and values."""
        return int(min(self.budget * shape.token_bytes * self.page, self._most(shape)))

    def _most(self, shape: LayerShape) -> int:
        return 2 * sum(group_bytes(size, max(self.widths), self.page) for size in group_sizes(shape.width))

    def _widths(self, fitted: Fitted, side: str, budget: int) -> Tensor:
        sizes = group_sizes(len(fitted[f"{side}_variance"]))
        chosen = _bits.fill(energies_of(fitted, side), sizes, budget, self.widths, self.page)
        return torch.tensor(chosen, dtype=torch.uint8)

    def _points(self, fitted: Fitted, side: str) -> Iterator[tuple[int, Tensor, float]]:
        """(bytes of a page, widths, expected squared error over the variance) at the rates that a curve has."""
        channels, seen = len(fitted[f"{side}_variance"]), -1
        for rate in POINTS:
            widths = self._widths(fitted, side, int(rate * channels * self.page / 8))
            size = _bits.cost_of(widths.tolist(), group_sizes(channels), self.page)
            if size > seen:
                yield size, widths, self._error(fitted, side, widths)
            seen = size

    def _error(self, fitted: Fitted, side: str, widths: Tensor) -> float:
        """Expected squared error over the variance, in the side's metric."""
        energies = energies_of(fitted, side)
        return _bits.error_of(widths.tolist(), energies) / max(sum(energies), 1e-30)

    def _by_kl(self, fitted: Fitted, layer: int, side: str, shape: LayerShape, probe: Probe) -> _bits.Curve:
        """KL of the model's predictions with this side alone read through its codec.

        What is below the noise is not measured: from there on the KL falls as the expected squared error does.
        """
        curve: list[tuple[int, float]] = []
        quiet: float | None = None  # KL over expected error at the last point that was measured
        for size, widths, error in self._points(fitted, side):
            if quiet is None:
                codec = self._codec(side, shape, {**fitted, f"{side}_widths": widths})
                metric = self.key_metric if side == "key" else self.value_metric  # the other side's does not matter
                key = (layer, side, size, self.widths, self.rotate, metric)
                pair = (codec, None) if side == "key" else (None, codec)
                curve.append((size, probe.once(key, lambda pair=pair: probe.kl({layer: pair}))))
                quiet = curve[-1][1] / error if curve[-1][1] < NOTHING and error > 0 else None
            else:
                curve.append((size, quiet * error))
        return curve

    def _codec(self, side: str, shape: LayerShape, fitted: Fitted) -> BasisCodec:
        """Whitening and rotation folded into the basis, so that the stored numbers are unit normals."""
        fitted = trimmed(fitted, side)
        up, variance, mean = (fitted[f"{side}_{name}"] for name in ("up", "variance", "mean"))
        down = fitted.get(f"{side}_down", up.transpose(1, 2))
        packing = Mixed(group_sizes(len(variance)), tuple(fitted[f"{side}_widths"].tolist()), self.page)
        scale = variance.clamp_min(FLOOR).sqrt()
        down, up = down / scale, up * scale[:, None]
        turns = [rotation(part.stop - part.start) for _, part in packing.runs()]
        if self.rotate and turns:
            turn = torch.block_diag(*turns).to(up)
            down, up = down @ turn, turn.T @ up
        return BasisCodec("k_pre" if side == "key" else "v", down.contiguous(), up.contiguous(), mean, packing)


def group_sizes(channels: int) -> tuple[int, ...]:
    """Channels of each group: GROUP, and what is left over."""
    return (GROUP,) * (channels // GROUP) + ((channels % GROUP,) if channels % GROUP else ())


def energies_of(fitted: Fitted, side: str) -> list[float]:
    """Variance of each group of channels."""
    variance = fitted[f"{side}_variance"].double()
    return [float(part.sum()) for part in variance.split(group_sizes(len(variance)))]


def trimmed(fitted: Fitted, side: str) -> dict[str, Tensor]:
    """Without the directions of width 0."""
    widths, variance = fitted[f"{side}_widths"], fitted[f"{side}_variance"]
    sizes = torch.tensor(group_sizes(len(variance)), device=widths.device, dtype=torch.long)
    there = (widths > 0).repeat_interleave(sizes)
    changed = {
        f"{side}_widths": widths[widths > 0],
        f"{side}_variance": variance[there],
        f"{side}_up": fitted[f"{side}_up"][:, there],
    }
    if f"{side}_down" in fitted:
        changed[f"{side}_down"] = fitted[f"{side}_down"][..., there]
    return {**fitted, **{k: t.contiguous() for k, t in changed.items()}}


METHOD = Spectral
