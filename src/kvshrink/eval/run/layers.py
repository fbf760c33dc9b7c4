"""What a cache does to each layer by itself: every attention module is called twice with the same, exact input.

The document goes through the model with the full cache. Each call of an attention module is repeated with the
compressed cache in place of the full one, so errors do not add up from layer to layer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache

from kvshrink.attach import attach
from kvshrink.attach.families import LayerInfo
from kvshrink.cache import KVCache
from kvshrink.cache.attend import rebuild
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.rope import Rope
from kvshrink.errors import EvalError
from kvshrink.eval.run.teacher import Tokens, checked, compressed_tokens, opened, remedy
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.store.modes import without_dropout


@final
@dataclass(frozen=True)
class LayerError:
    """Errors of one compressed layer, all relative: |x - x'| / |x|, in Frobenius norm.

    key_error, key_rope_error: keys of the prefix that are stored compressed, before RoPE and as attention uses them.
                               A rotation keeps lengths, so they agree but for rounding. None if tokens are dropped.
    value_error:               the same of the values.
    output_error:              of the attention module's output, after its o_proj, over the scored positions.
    output_cosine:             cosine between the two outputs, mean over those positions.
    """

    layer: int
    key_error: float | None
    key_rope_error: float | None
    value_error: float | None
    output_error: float
    output_cosine: float

    def to_dict(self) -> dict:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


@without_dropout
@torch.inference_mode()
def layer_errors(model: Any, method: Method | Artifact, ids: Tokens, prefix: int, chunk: int = 1) -> list[LayerError]:
    """One row per compressed layer: ids[:prefix - 1] is stored, then the model is fed from there, `chunk` tokens at a
    time, but for the last token. Raises EvalError if nothing of the prefix is compressed."""
    ids, prefix = checked(model, ids, prefix, chunk)
    dense, caches = opened(model, {"cache": method}, ids[:, : prefix - 1])
    cache, attachment = caches["cache"], attach(model)
    assert cache is not None
    if not compressed_tokens(cache):
        raise EvalError(f"a prefix of {prefix} tokens is held exactly. Use {remedy(cache.method)}")
    stored = {i: _stored(cache, dense, i, info) for i, info in enumerate(attachment.layers) if info.compressed}
    outputs = {i: _Output() for i in stored}
    hooks = [
        attachment.layers[i].module.register_forward_hook(_again(cache, dense, out), with_kwargs=True)
        for i, out in outputs.items()
    ]
    try:
        for at in range(prefix - 1, ids.shape[1] - 1, chunk):
            model(input_ids=ids[:, at : min(at + chunk, ids.shape[1] - 1)], past_key_values=dense, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [LayerError(i, k, post, v, *outputs[i].result()) for i, (k, post, v) in stored.items()]


class _Output:
    """Sums over positions for one layer's output error, in float64."""

    def __init__(self) -> None:
        self.wrong = self.size = self.cosine = 0.0
        self.count = 0

    def add(self, exact: Tensor, ours: Tensor) -> None:
        exact, ours = exact.double().flatten(0, -2), ours.double().flatten(0, -2)
        self.wrong += float((exact - ours).square().sum())
        self.size += float(exact.square().sum())
        self.cosine += float(torch.cosine_similarity(exact, ours, dim=-1).sum())
        self.count += len(exact)

    def result(self) -> tuple[float, float]:
        return (self.wrong / self.size) ** 0.5, self.cosine / self.count


def _again(cache: KVCache, dense: DynamicCache, out: _Output) -> Callable:
    """Forward hook: the same call with the compressed cache. The module's other hooks stage what that cache needs."""

    def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if kwargs.get("past_key_values") is dense:
            out.add(output[0], module(*args, **{**kwargs, "past_key_values": cache})[0])

    return hook


def _stored(
    cache: KVCache, dense: DynamicCache, index: int, info: LayerInfo
) -> tuple[float, float, float] | tuple[None, None, None]:
    """(key error before RoPE, as attention uses them, value error) over the columns that lie in the layer's pages."""
    layer = cache.layers[index]
    assert isinstance(layer, CompressedLayer)
    if layer.codecs is None:
        return None, None, None
    snapshot = layer.snapshot(info.rope)
    first = min(int(tier.pages.first[0, 0]) for tier in snapshot.tiers)
    body = slice(first if snapshot.hidden is None else max(first, snapshot.hidden.most), snapshot.first)
    keys, values = rebuild(snapshot, *layer.window.view())
    full: Any = dense.layers[index]
    ours, exact = keys[:, :, body], full.keys[:, :, body]
    positions = layer.table.positions[:, body]
    before = relative(_turned_back(exact, info.rope, positions), _turned_back(ours, info.rope, positions))
    return before, relative(exact, ours), relative(full.values[:, :, body], values[:, :, body])


def _turned_back(keys: Tensor, rope: Rope | None, positions: Tensor) -> Tensor:
    return keys if rope is None else rope.undo(keys, positions)


def relative(exact: Tensor, ours: Tensor) -> float:
    """|exact - ours| / |exact|."""
    return float((exact.double() - ours.double()).norm() / exact.double().norm())
