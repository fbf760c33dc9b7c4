"""Ways to hold one layer's cache and to decode over it. A step takes one token in and gives the attention output."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from layer import Layer, fitted
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvshrink.attach.attention import kvshrink_attention
from kvshrink.attach.grouped import grouped
from kvshrink.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.methods._roles import Method
from kvshrink.methods.lowrank.sals import SALS
from kvshrink.store.bytes import nbytes
from kvshrink.store.tokens import TokenTable


@dataclass
class Contender:
    """step:   takes one token in and gives the attention output [b, q, 1, d]; `attend` gives it without taking one in.
    held:   bytes alive.
    error:  relative error of a step's output against float32 attention over the same cache at full width.
    """

    name: str
    step: Callable[[], Tensor]
    attend: Callable[[], Tensor]
    held: Callable[[], int]
    error: Callable[[], float]


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def _sdpa(layer: Layer, keys: Tensor, values: Tensor) -> Tensor:
    return sdpa_attention_forward(layer.module, layer.query, keys, values, None)[0].transpose(1, 2)


def growing(layer: Layer) -> Contender:
    """What `generate` does by default: DynamicCache concatenates, sdpa attends."""
    cache = DynamicCache()
    cache.update(layer.keys, layer.values, 0)
    held = cache.layers[0]

    def step() -> Tensor:
        return _sdpa(layer, *cache.update(layer.key, layer.value, 0))

    def error() -> float:
        return _relative(step(), layer.exact(held.keys, held.values))

    def attend() -> Tensor:
        return _sdpa(layer, held.keys, held.values)

    return Contender("DynamicCache + sdpa", step, attend, lambda: nbytes([held.keys, held.values]), error)


def in_place(layer: Layer) -> list[Contender]:
    """The full cache in memory taken beforehand, so that a step copies one token: four ways to attend to it.

    The buffers are shared and the step's slot, the last one, is overwritten each time; with more room behind it, as a
    cache that grows needs, torch's matmul copies.
    """
    keys, values = torch.cat([layer.keys, layer.key], 2), torch.cat([layer.values, layer.value], 2)

    def contender(name: str, attention: Callable[[], Tensor]) -> Contender:
        def step() -> Tensor:
            keys[:, :, -1:], values[:, :, -1:] = layer.key, layer.value
            return attention()

        def error() -> float:
            return _relative(step(), layer.exact(keys, values))

        return Contender(name, step, attention, lambda: nbytes([keys, values]), error)

    def matmul() -> Tensor:
        b, h, _, d = keys.shape
        query = layer.query.view(b, h, -1, d) * d**-0.5
        weights = (query @ keys.transpose(2, 3)).float().softmax(-1).to(query.dtype)
        return (weights @ values).view(b, -1, 1, d)

    def packed() -> Tensor:
        """The query heads of a KV head as rows: what transformers does where a mask is given, as with padding."""
        b, h, _, d = keys.shape
        query = layer.query.view(b, h, -1, d)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values).view(b, -1, 1, d)

    def ours() -> Tensor:
        found = grouped(layer.query, keys, values, None, None)
        assert found is not None
        return found

    found = [
        contender("full, in place, sdpa", lambda: _sdpa(layer, keys, values)),
        contender("full, in place, sdpa packed", packed),
        contender("full, in place, grouped matmul", matmul),
    ]
    if grouped(layer.query, keys, values, None, None) is not None:
        found.append(contender("full, in place, kvshrink kernel", ours))
    return found


def quantized(layer: Layer, backend: str) -> Contender:
    """transformers' own quantised cache: dequantises everything each step, attends by sdpa."""
    kind = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}[backend]
    axis = 0 if backend == "quanto" else 1
    cache = getattr(cache_utils, kind)(nbits=4, axis_key=axis, axis_value=axis)
    cache.update(layer.keys, layer.values)

    def step() -> Tensor:
        return _sdpa(layer, *cache.update(layer.key, layer.value))

    def error() -> float:
        keys, values = cache.update(layer.key, layer.value)
        return _relative(_sdpa(layer, keys, values), layer.exact(keys, values))

    def held() -> int:
        both = (cache._quantized_keys, cache._quantized_values)
        if backend == "quanto":
            packed = [t for q in both for t in (q._data._data, q._scale, q._shift)]
        else:
            packed = [t for codes, meta in both for t in (codes, meta["scale"], meta["zero"])]
        return nbytes([*packed, cache.keys, cache.values])

    return Contender(f"QuantizedCache {backend} int4", step, step, held, error)


def shrunken(layer: Layer, name: str, method: Method) -> Contender:
    """kvshrink's cache and attention, as a model runs them. What reads a part of the tokens is checked reading all."""
    shape = layer.shape
    method = method.resolve_auto([shape], layer.device)
    learnt = {k: t.to(layer.device) for k, t in fitted(method, shape).items()} if method.needs_fit else {}
    table = TokenTable()
    compressed = CompressedLayer(method, shape, method.tiers(shape, learnt), table)
    cache = KVCache([compressed], method, table, "bench", "bench")

    def update(keys: Tensor, values: Tensor, own: bool = True) -> tuple[Tensor, Tensor]:
        positions = torch.arange(
            compressed.seen, compressed.seen + keys.shape[2], dtype=torch.int32, device=layer.device
        )
        cache.stage(0, positions[None], None, layer.rope, own, "bench")
        return cache.update(keys, values, 0)

    def attention(keys: Tensor, values: Tensor) -> Tensor:
        return kvshrink_attention(layer.module, layer.query, keys, values, None)[0].transpose(1, 2)

    def step() -> Tensor:
        return attention(*update(layer.key, layer.value))

    def error() -> float:
        if isinstance(method, SALS) and method.topk != 1.0:
            return shrunken(layer, name, replace(method, topk=1.0)).error()
        got = step()
        cache.crop(-1)
        return _relative(got, layer.exact(*update(layer.key, layer.value, own=False)))

    returned: list[tuple[Tensor, Tensor]] = []

    def attend() -> Tensor:
        if not returned:
            returned.append(update(layer.key, layer.value))
        return attention(*returned[0])

    update(layer.keys, layer.values)
    return Contender(name, step, attend, lambda: cache.nbytes, error)
