"""CSKV under one byte budget: the rank of each layer's keys and of its values, by what a loss there costs the model.

The channels that a side leaves out are its directions of least variance, so its error at any rank is known; what an
error costs is measured as KL of the whole model's predictions (`_measured`), and bytes go where KL falls most.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.kernels.normal import expected_error
from kvshrink.methods._codecs.basis import leading, metrics_of, spectrum
from kvshrink.methods._roles import Codec, Fitted
from kvshrink.methods._settings import require
from kvshrink.methods._stats import KV, KVS, CalibrationStats, LayerShape, Probe
from kvshrink.methods.lowrank import _bits
from kvshrink.methods.lowrank._measured import Point, curve, losses_each

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the full rank: points of a curve


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
    points = {(i, kv): list(_points(method, layers[i], kv, shapes[i])) for i, kv in operands}
    least, budget = sum(p[0].size for p in points.values()), sum(page_bytes(method, shapes[i]) for i in layers)
    if least > budget:
        share = least / sum(shapes[i].token_bytes * method.page for i in layers)
        raise SettingError(f"budget={method.budget} is less than a channel for all keys and values. Use {share:.2g}.")
    curves: dict[tuple[int, KV], _bits.Curve] = {}
    for i, kv in operands:
        measured = partial(_kl, method, layers[i], i, kv, shapes[i], probe)
        found = curve(points[i, kv], measured, losses_each(len(operands)))
        curves[i, kv] = [(size - found[0][0], cost) for size, cost in found]  # the first point all have
    given = _bits.share(curves, budget - least)
    ranks, left = {}, budget - least - sum(given.values())
    for i, kv in sorted(operands, key=lambda at: -given[at]):  # what one cannot use up, the next may
        room = points[i, kv][0].size + given[i, kv] + left
        ranks[i, kv] = _largest(method, layers[i], kv, shapes[i], room)
        left = room - _cost(method, kv, shapes[i], ranks[i, kv])
    done = {i: _cut(_cut(layers[i], "key", ranks[i, "key"]), "value", ranks[i, "value"]) for i in layers}
    errors = {i: {f"{kv}_error": _error(method, layers[i], kv, ranks[i, kv]) for kv in KVS} for i in layers}
    named = {f"{i} {kv}": rank for (i, kv), rank in sorted(ranks.items())}
    return done, {"ranks": named, "unspent": left / max(1, budget), "layers": errors}


def page_bytes(method: Any, shape: LayerShape) -> int:
    """Bytes of a layer's page, keys and values, at the budget."""
    assert method.budget is not None
    return min(int(method.budget * shape.token_bytes * method.page), most_bytes(method, shape))


def most_bytes(method: Any, shape: LayerShape) -> int:
    """Bytes of a layer's page of all channels."""
    return sum(_cost(method, kv, shape, shape.width // method.bases(kv, shape)) for kv in KVS)


def _points(method: Any, fitted: Fitted, kv: KV, shape: LayerShape) -> Iterator[Point]:
    full = fitted[f"{kv}_up"].shape[1]
    for rank in sorted({max(1, round(share * full)) for share in SHARES}):
        yield Point(_cost(method, kv, shape, rank), rank, _error(method, fitted, kv, rank))


def _cost(method: Any, kv: KV, shape: LayerShape, rank: int) -> int:
    return int(method.stored(kv, method.bases(kv, shape), rank, shape.dtype, {}).page_bytes())


def _largest(method: Any, fitted: Fitted, kv: KV, shape: LayerShape, room: int) -> int:
    """The largest rank of at most so many bytes a page."""
    ranks = range(1, fitted[f"{kv}_up"].shape[1] + 1)
    return max(rank for rank in ranks if rank == 1 or _cost(method, kv, shape, rank) <= room)


def _error(method: Any, fitted: Fitted, kv: KV, rank: int) -> float:
    """Expected squared error over the variance, with what codes of so many bits lose of a normal number."""
    variance = fitted[f"{kv}_variance"].double()
    kept, whole = float(variance[:, :rank].sum()), float(variance.sum())
    bits = method.own[1]
    rounding = expected_error(int(bits)) if bits is not None else 0.0
    return 1.0 - (1.0 - rounding) * kept / max(whole, 1e-30)


def _kl(method: Any, fitted: Fitted, layer: int, kv: KV, shape: LayerShape, probe: Probe, at: Point) -> float:
    codec = method.codecs(shape, _cut(fitted, kv, at.setting))[KVS.index(kv)]
    metric = method.key_metric if kv == "key" else method.value_metric  # the other does not matter
    pair: tuple[Codec | None, Codec | None] = (codec, None) if kv == "key" else (None, codec)
    key = ("cskv", layer, kv, at.setting, method.own, method.group_heads, metric)
    return probe.once(key, partial(probe.kl, {layer: pair}))


def _cut(fitted: Fitted, kv: KV, rank: int) -> dict[str, Tensor]:
    """With the first `rank` directions of one side, and without its variances."""
    return {k: t for k, t in {**fitted, **leading(fitted, kv, rank)}.items() if k != f"{kv}_variance"}
