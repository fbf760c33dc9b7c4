"""Spectral bits: bits are allocated to latent channels by variance (reverse water-filling), under one byte budget.

Rank and bits are one question: a channel left out is a channel of 0 bits. Channels of a layer's keys (before RoPE) and
values are ordered by variance, in groups of 16; each group has a width of its own; the bytes are shared between layers,
keys and values by what a loss there costs the model, measured as KL with all layers lossy. Keys are rebuilt a block at
a time and values stay latent, as in CSKV (arXiv 2409.10593); nothing is ever held at full width.

Sources: transform and adaptive bits as in KVTC's storage codec (arXiv 2511.01815); the Lloyd-Max codes of rotated, unit
numbers as in TurboQuant (arXiv 2504.19874). Departures: the store is resident and attended over; one gain per page and
group, none per token; allocation by measured KL instead of mean squared error.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.kernels.latents import code_of
from kvshrink.methods._codecs.basis import METRICS, BasisCodec, blocks_of, metrics_of, spectrum
from kvshrink.methods._packing.mixed import Mixed, group_bytes, group_sizes
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._rotate import rotation
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KVS, CalibrationStats, LayerShape, Probe
from kvshrink.methods.lowrank import _bits
from kvshrink.methods.lowrank._balance import At, Point, by_kl, spent
from kvshrink.methods.lowrank._groups import bases_of
from kvshrink.methods.lowrank._operand import energies_of, layout_of, trimmed
from kvshrink.methods.lowrank.rope_commuting import commuting_spectrum

CONSTANT = "key_constant"  # [h, d] in what is fitted, of keys after RoPE: their mean before it
POINTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # bits a channel
FLOOR = 1e-20  # a direction without variance has no scale of its own


@final
@dataclass(frozen=True)
class Spectral(Method):
    """Latents of keys and values with bits allocated by variance.

    budget:     bytes of the body over the full cache's, gains included, window and sinks not; over all layers.
    widths:     widths that a group of 16 channels may have, beside 0.
    allocation: how bytes are shared between layers, keys and values: "kl" (measured on the whole model, which must
                be in memory), "energy" (relative squared error, needs no model), "uniform" (the same for each).
    speed:      what a step does to keys. "accurate": rebuilds them from one basis for all heads. "balanced": nothing;
                they are stored after RoPE, less what all have in common, in a basis of all heads that commutes with
                RoPE (as `rope_commuting`'s), and queries are taken to it. "fast": the same for each head by itself.
                "apart": values too, so that heads may hold different tokens (methods/evict/compose.py); what keys have
                in common is in the basis.
                docs/accuracy.md has the KL of each, docs/speed.md the time.
    group_heads: KV heads that share one key basis that is rebuilt; None: all.
    shards:     ranks of a tensor-parallel server: no basis, of keys or of values, goes beyond one's heads.
    code:       what the bits of a channel are: of trellis-coded quantisation, 17 to 35 % less squared error at the same
                bits, or of a Lloyd-Max quantiser, quicker to store.
    rotate:     Hadamard-rotate the channels of one width (folded into the basis): outliers are spread.
    key_metric, value_metric: as CSKV's.
    """

    budget: float = 0.0625
    widths: tuple[int, ...] = (1, 2, 3, 4, 8)
    allocation: Literal["kl", "energy", "uniform"] = "kl"
    group_heads: int | None = None
    speed: Literal["accurate", "balanced", "fast", "apart"] = "accurate"
    code: Literal["trellis", "scalar"] = "trellis"
    rotate: bool = True
    key_metric: Literal["plain", "query"] = "plain"
    value_metric: Literal["plain", "output"] = "plain"
    shards: int = 1

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "budget"
    byte_neutral: ClassVar[frozenset[str]] = frozenset({"rotate", *METRICS})

    def check(self) -> None:
        super().check()
        require(0 < self.budget <= 1, f"budget={self.budget}", "Use a share of bytes above 0, up to 1.")
        ok = bool(self.widths) and all(w in (1, 2, 3, 4, 8) for w in self.widths)
        require(ok, f"widths={self.widths}", "Use some of 1, 2, 3, 4, 8.")
        heads = self.group_heads
        require(heads is None or heads >= 1, f"group_heads={heads}", "Use 1 or more, or None for all.")
        require(self.shards >= 1, f"shards={self.shards}", "Use a whole number, 1 or more.")
        slow, given = self.speed == "accurate", f"speed={self.speed!r} with"
        require(slow or heads is None, f"{given} group_heads={heads}", "Give one of them.")
        require(
            not self.commutes or self.key_metric == "plain", f"{given} key_metric={self.key_metric!r}", "Use 'plain'."
        )

    @property
    def rounds_window(self) -> bool:
        return True

    @property
    def probes(self) -> bool:
        return self.allocation == "kl"

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        # weighted metrics and codes that are not rotated do not pay (docs/log.md)
        return {"speed": ("accurate", "balanced", "fast")}

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        """From one group of channels a layer on, which `finish` can always give, in steps of a ten-thousandth."""
        page = shape.token_bytes * self.page
        least = self._least(shape) / page
        most = min(1.0, self._most(shape) / page)
        return [k / 10_000 for k in range(math.ceil(10_000 * least), int(10_000 * most) + 1)]

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """The budget, which all layers together keep to, where nothing is fitted yet."""
        if fitted:
            return super().bits_per_token(shape, fitted)
        return self._budget(shape) * 8 / self.page

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """All directions of one layer, and widths for this layer by itself."""
        metrics = metrics_of(self, stats)
        out: dict[str, Tensor] = {}
        for kv, moments, metric in zip(KVS, (stats.key, stats.value), metrics, strict=True):
            bases = self.bases(kv, stats.shape)
            mean = moments.mean.unflatten(0, (bases, -1))
            if kv == "key" and self.commutes:
                own = moments.covariance
                if self.speed == "apart":  # lanes have positions of their own, for which kernels know no constant
                    own = own + torch.outer(moments.mean, moments.mean)
                else:
                    out[CONSTANT] = moments.mean.view(stats.shape.heads, -1)  # it turns with the position
                parts = [
                    commuting_spectrum(block, stats.shape.heads // bases, stats.pairs)
                    for block in blocks_of(own, bases)
                ]
                variance, up = (torch.cat(part) for part in zip(*parts, strict=True))
                mean = torch.zeros_like(mean)
            else:
                variance, down, up = spectrum(moments.covariance, bases, stats.shape.width // bases, metric)
            out |= {f"{kv}_up": up, f"{kv}_variance": variance.flatten(), f"{kv}_mean": mean}
            if metric is not None:
                out[f"{kv}_down"] = down
        out = {k: t.float().contiguous() for k, t in out.items()}
        given = _bits.share({kv: [p[::2] for p in self._points(out, kv)] for kv in KVS}, self._budget(stats.shape))
        return out | {f"{kv}_widths": self._widths(out, kv, given[kv]) for kv in KVS}

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        """Share the budget between the operands of all layers, and keep the directions that got bits."""
        budget = sum(self._budget(shapes[i]) for i in layers)
        group = self._least(next(iter(shapes.values())))
        if budget < group:
            raise self._too_little(group, shapes, layers)
        points = {(i, kv): list(self._points(layers[i], kv)) for i in layers for kv in KVS}
        given: Mapping[At, float] = dict.fromkeys(points, budget // len(points))
        known: dict[str, Any] = {}
        if self.allocation == "energy":
            given = _bits.share({at: [p[::2] for p in own] for at, own in points.items()}, budget)
        elif self.allocation == "kl":
            assert probe is not None
            metrics = self.key_metric, self.value_metric
            key = ("spectral", self.widths, self.code, self.speed, self.group_heads, self.shards, metrics)
            given, known["kl"] = by_kl(probe, key, points, budget, partial(self._codecs_at, layers, shapes))

        def take(at: At, room: float) -> tuple[Tensor, int]:
            widths = self._widths(layers[at[0]], at[1], int(room))
            return widths, self._cost(layers[at[0]], at[1], widths)

        widths, left = spent(given, budget, take)
        if not any(bool(w.any()) for w in widths.values()):
            raise self._too_little(group, shapes, layers)
        done = {}
        for i in layers:
            chosen = {f"{kv}_widths": widths[i, kv] for kv in KVS}
            done[i] = trimmed(trimmed({**layers[i], **chosen}, "key"), "value")
        named = {f"{i} {kv}": w.tolist() for (i, kv), w in sorted(widths.items())}
        errors = {i: {f"{kv}_error": self._error(layers[i], kv, widths[i, kv]) for kv in KVS} for i in layers}
        return done, known | {"widths": named, "unspent": left / max(1, budget), "layers": errors}

    def _too_little(self, group: int, shapes: Mapping[int, LayerShape], layers: Mapping[int, Any]) -> SettingError:
        each = math.ceil(group / len(layers))  # whole bytes of a layer
        least = math.ceil(1e5 * each / min(shapes[i].token_bytes * self.page for i in layers)) / 1e5
        return SettingError(f"budget={self.budget} is less than one group of channels takes. Use {least:g} or more.")

    def _codecs_at(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], given: Mapping[At, float]
    ) -> dict[int, tuple[Codec, Codec]]:
        """Of each layer, at so many bytes for each operand."""
        own = {(i, kv): self._widths(layers[i], kv, int(size)) for (i, kv), size in given.items()}
        widths = {i: {f"{kv}_widths": own[i, kv] for kv in KVS} for i in layers}
        return {i: self.codecs(shapes[i], {**fitted, **widths[i]}) for i, fitted in layers.items()}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        return self._codec("key", shape, fitted), self._codec("value", shape, fitted)

    def _budget(self, shape: LayerShape) -> int:
        """Bytes of a layer's page, keys and values."""
        return int(min(self.budget * shape.token_bytes * self.page, self._most(shape)))

    def bases(self, kv: str, shape: LayerShape) -> int:
        """How many bases there are. Raises SettingError where the heads cannot be shared out so."""
        own = bases_of(1 if self.speed in ("fast", "apart") else self.group_heads, shape.heads, self.shards)
        if kv == "value":
            return shape.heads if self.speed == "apart" else self.shards
        return own

    def lane_groups(self, shape: LayerShape) -> int:
        return shape.heads if self.speed == "apart" else 1

    @property
    def commutes(self) -> bool:
        """Whether keys are stored after RoPE, and never rebuilt."""
        return self.speed != "accurate"

    @property
    def form(self) -> Literal["normal", "trellis"]:
        """How packed codes are to be read, as kernels/latents names it."""
        return "trellis" if self.code == "trellis" else "normal"

    def error(self, bits: int) -> float:
        """Expected squared error of a unit normal number."""
        return float(code_of(self.form, bits).expected_error(bits))

    def _most(self, shape: LayerShape) -> int:
        """Bytes of a layer's page at the largest width."""
        widest, found = max(self.widths), 0
        for bases in (self.bases(kv, shape) for kv in KVS):
            found += bases * sum(group_bytes(size, widest, self.page) for size in group_sizes(shape.width // bases))
        return found

    def _least(self, shape: LayerShape) -> int:
        """Bytes of a page of one group of channels, which all bases of keys or of values have."""
        bases = [self.bases(kv, shape) for kv in KVS]
        return min(n * group_bytes(min(group_sizes(shape.width // n)), min(self.widths), self.page) for n in bases)

    def _widths(self, fitted: Fitted, kv: str, budget: int) -> Tensor:
        bases, sizes = layout_of(fitted, kv)
        chosen = _bits.fill(energies_of(fitted, kv), sizes, budget // bases, self.widths, self.page, self.error)
        return torch.tensor(chosen, dtype=torch.uint8)

    def _cost(self, fitted: Fitted, kv: str, widths: Tensor) -> int:
        """Bytes of a page at these widths."""
        bases, sizes = layout_of(fitted, kv)
        return bases * _bits.cost_of(widths.tolist(), sizes, self.page)

    def _points(self, fitted: Fitted, kv: str) -> Iterator[Point]:
        """At the rates that a curve has; settings are widths."""
        channels, seen = len(fitted[f"{kv}_variance"]), -1
        for rate in POINTS:
            widths = self._widths(fitted, kv, int(rate * channels * self.page / 8))
            size = self._cost(fitted, kv, widths)
            if size > seen:
                yield Point(size, widths, self._error(fitted, kv, widths))
            seen = size

    def _error(self, fitted: Fitted, kv: str, widths: Tensor) -> float:
        """Expected squared error over the variance, in the operand's metric."""
        energies = energies_of(fitted, kv)
        return _bits.error_of(widths.tolist(), energies, self.error) / max(sum(energies), 1e-30)

    def _codec(self, kv: str, shape: LayerShape, fitted: Fitted) -> BasisCodec:
        """Whitening and rotation folded into the basis, so that the stored numbers are unit normals."""
        fitted = trimmed(fitted, kv)
        up, mean = fitted[f"{kv}_up"], fitted[f"{kv}_mean"]
        down = fitted.get(f"{kv}_down", up.transpose(1, 2))
        widths = tuple(fitted[f"{kv}_widths"].tolist())
        packing = Mixed(group_sizes(up.shape[1]), widths, self.page, len(mean), self.form)
        scale = fitted[f"{kv}_variance"].view(len(mean), -1).clamp_min(FLOOR).sqrt()
        down, up = down / scale[:, None], up * scale[:, :, None]
        matrices = [rotation(part.stop - part.start) for _, part in packing.runs()]
        if self.rotate and matrices:
            matrix = torch.block_diag(*matrices).to(up)
            down, up = down @ matrix, matrix.T @ up
        site: Literal["k_pre", "k_post", "v"] = "v"
        if kv == "key":
            site = "k_post" if self.commutes else "k_pre"
        constant = fitted[CONSTANT] if kv == "key" and self.commutes and self.speed != "apart" else None
        return BasisCodec(site, down.contiguous(), up.contiguous(), mean, packing, constant)


METHOD = Spectral
