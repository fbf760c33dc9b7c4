"""Rows that join and leave a batch: caches as one, and rows as caches. No record is copied, nothing is padded."""

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.sliding import joined_sliding, sliding_row
from kvshrink.errors import CacheError
from kvshrink.store.tokens import TokenTable


def check_alike(kinds: Sequence[tuple], lengths: Sequence[int]) -> None:
    """Raise CacheError unless caches of these (attachment, method's digest, layers) and lengths can be one batch."""
    if not kinds:
        raise CacheError("join takes one or more caches, not none.")
    if min(lengths) == 0:
        raise CacheError(f"cache {lengths.index(0)} of {len(lengths)} is empty. Join caches that hold a prompt.")
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise CacheError(f"cache {i} of {len(kinds)} is of another model or method than cache 0. Join those alike.")


def joined_layers(parts: Sequence[Sequence[Any]], table: TokenTable) -> list[CacheLayerMixin]:
    """Layer by layer, the rows of all."""
    found: list[CacheLayerMixin] = []
    for layers in zip(*parts, strict=True):
        if isinstance(layers[0], CompressedLayer):
            found.append(CompressedLayer.joined(layers, table, _base(layers[0], parts[0], found)))
        else:
            found.append(joined_sliding(layers, table.length))
    return found


def layers_of_row(layers: Sequence[Any], number: int, table: TokenTable) -> list[CacheLayerMixin]:
    """Layer by layer, one row alone."""
    found: list[CacheLayerMixin] = []
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            found.append(layer.row(number, table, _base(layer, layers, found)))
        else:
            found.append(sliding_row(layer, number, table.length))
    return found


def _base(layer: CompressedLayer, old: Sequence[Any], new: Sequence[CacheLayerMixin]) -> CompressedLayer | None:
    """The new layer in the place of the one that this layer follows."""
    place = next((i for i, other in enumerate(old) if other is layer.base), None)
    found = None if place is None else new[place]
    assert found is None or isinstance(found, CompressedLayer)
    return found
