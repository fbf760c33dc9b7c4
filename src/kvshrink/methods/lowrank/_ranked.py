"""CSKV under one byte budget: rank and bits of each layer's keys and values, by what a loss there costs the model.

The channels that a side leaves out are its directions of least variance, so its error at any rank is known; what an
error costs is measured as KL of the whole model's predictions, where all layers are lossy (`_balance`). At so many
bytes a side may have more directions or more bits for each: it gets what has the least error.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.kernels import normal, trellis
from kvshrink.methods._codecs.basis import leading, metrics_of, spectrum
from kvshrink.methods._roles import Codec, Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV, KVS, CalibrationStats, LayerShape, Probe
from kvshrink.methods.lowrank._balance import At, Point, by_kl, spent

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the full rank: points of a curve
CODEC, BITS = "tcq", (2, 3, 4)  # of latents, where a method does not say


def check(method: Any, budget: float) -> None:
    """Raise SettingError on settings that do not go with a budget."""
    require(0 < budget <= 1, f"budget={budget}", "Use a share of bytes above 0, up to 1.")
    given = f"budget={budget} with"
    require(method.key_share == 0.5, f"{given} key_share={method.key_share!r}", "The budget shares channels out.")
    require(method.init == "pca", f"{given} init={method.init!r}", "Use 'pca', whose directions are in order.")
    trained = method.steps > 0
    require(method.loss == "kl" or not trained, f"{given} loss={method.loss!r}", "Use 'kl', after ranks are known.")
    require(not method.matryoshka, f"{given} matryoshka=True", "Its ranks are for this budget alone.")
    why = "learns from one basis" if method.samples else method.apart({})
    require(not why, f"{given} codec={method.codec!r}", f"It {why}. Use keep.")


def start(method: Any, stats: CalibrationStats) -> dict[str, Tensor]:
    """All directions of one layer, the largest variance first, and the variances."""
    found: dict[str, Tensor] = {}
    metrics = metrics_of(method, stats)
    for kv, moments, metric in zip(KVS, (stats.key, stats.value), metrics, strict=True):
        bases = method.bases(kv, stats.shape)
        variance, down, up = spectrum(moments.covariance, bases, stats.shape.width // bases, metric)
        found |= {f"{kv}_up": up, f"{kv}_variance": variance, f"{kv}_mean": moments.mean.unflatten(0, (bases, -1))}
        if metric is not None:
            found[f"{kv}_down"] = down
    return {k: t.float().contiguous() for k, t in found.items()}


def finish(
    method: Any, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """The directions that the budget allows. Raises SettingError if it is less than a channel for every operand."""
    assert probe is not None
    operands = [(i, kv) for i in layers for kv in KVS]
    points = {(i, kv): _points(method, layers[i], kv, shapes[i], _ranks(layers[i], kv)) for i, kv in operands}
    least, budget = sum(p[0].size for p in points.values()), sum(page_bytes(method, shapes[i]) for i in layers)
    if least > budget:
        share = math.ceil(1e5 * least / sum(shapes[i].token_bytes * method.page for i in layers)) / 1e5
        raise SettingError(f"budget={method.budget} is less than a channel for all keys and values. Use {share:g}.")
    fine = {
        (i, kv): _points(method, layers[i], kv, shapes[i], range(1, layers[i][f"{kv}_up"].shape[1] + 1))
        for i, kv in operands
    }

    def take(at: At, room: float) -> tuple[Point, int]:
        point = ([p for p in fine[at] if p.size <= room] or fine[at][:1])[-1]
        return point, point.size

    def codecs(given: Mapping[At, float]) -> dict[int, tuple[Codec, Codec]]:
        own = {at: take(at, size)[0] for at, size in given.items()}
        return {i: method.codecs(shapes[i], _cut(method, fitted, own, i)) for i, fitted in layers.items()}

    key = ("cskv", method.own, method.group_heads, method.shards, method.key_metric, method.value_metric)
    given, kl = by_kl(probe, key, points, budget, codecs)
    chosen, left = spent(given, budget, take)
    done, errors, named = {}, {}, dict[str, Any]()
    for i in layers:
        done[i] = _cut(method, layers[i], chosen, i)
        errors[i] = {f"{kv}_error": chosen[i, kv].error for kv in KVS}
        named |= {f"{i} {kv}": chosen[i, kv].setting for kv in KVS}
    return done, {"kl": kl, "ranks and bits": named, "unspent": left / max(1, budget), "layers": errors}


def page_bytes(method: Any, shape: LayerShape) -> int:
    """Bytes of a layer's page, keys and values, at the budget."""
    return min(int(method.budget * shape.token_bytes * method.page), most_bytes(method, shape))


def most_bytes(method: Any, shape: LayerShape) -> int:
    """Bytes of a layer's page of all channels at the most bits."""
    return sum(_cost(method, kv, shape, shape.width // method.bases(kv, shape), None) for kv in KVS)


def _ranks(fitted: Fitted, kv: KV) -> Iterable[int]:
    """Those at which a curve has points."""
    full = fitted[f"{kv}_up"].shape[1]
    return sorted({max(1, round(share * full)) for share in SHARES})


def _points(method: Any, fitted: Fitted, kv: KV, shape: LayerShape, ranks: Iterable[int]) -> list[Point]:
    """The settings (rank, bits) that no other beats in bytes and error, the fewest bytes first."""
    variance = fitted[f"{kv}_variance"].double().sum(0)
    kept = (variance.cumsum(0) / variance.sum().clamp_min(1e-30)).tolist()
    every = []
    for rank, bits in product(ranks, method.tried):
        # what codes of so many bits lose of a normal number, of what the directions keep
        rounding = _error(method, bits)
        every.append(Point(_cost(method, kv, shape, rank, bits), (rank, bits), 1 - (1 - rounding) * kept[rank - 1]))
    best: list[Point] = []
    for point in sorted(every, key=lambda p: (p.size, p.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def _error(method: Any, bits: int | float | None) -> float:
    code = trellis if method.own[0] == CODEC else normal
    return 0.0 if bits is None else float(code.expected_error(int(bits)))


def _cost(method: Any, kv: KV, shape: LayerShape, rank: int, bits: int | float | None) -> int:
    packed = method.stored(kv, method.bases(kv, shape), rank, shape.dtype, _own_bits(method, kv, bits))
    return int(packed.page_bytes())


def _own_bits(method: Any, kv: KV, bits: int | float | None) -> dict[str, Tensor]:
    """How a fitted side says its bits, where they are not the method's."""
    return {f"{kv}_bits": torch.tensor(bits)} if bits is not None and len(method.tried) > 1 else {}


def _cut(method: Any, fitted: Fitted, chosen: Mapping[At, Point], layer: int) -> dict[str, Tensor]:
    """A layer with the directions and bits that were chosen, and without its variances."""
    found = {k: t for k, t in fitted.items() if not k.endswith("_variance")}
    for kv in KVS:
        rank, bits = chosen[layer, kv].setting
        found |= leading(fitted, kv, rank) | _own_bits(method, kv, bits)
    return found
