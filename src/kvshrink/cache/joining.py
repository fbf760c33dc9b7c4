"""Rows that join and leave a batch: caches as one, and rows as caches. No record is copied, nothing is padded."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from kvshrink.cache.body import Body
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.passed import has_states, joined_passed, passed_row, select_states
from kvshrink.cache.sinks import Sinks
from kvshrink.cache.window import Window
from kvshrink.errors import CacheError
from kvshrink.store.tokens import TokenTable


def check_alike(kinds: Sequence[tuple[Any, ...]], lengths: Sequence[int]) -> None:
    """Raise CacheError unless caches of these (attachment, method's digest, layers) and lengths can be one batch."""
    if not kinds:
        raise CacheError("join takes one or more caches, not none.")
    if min(lengths) == 0:
        raise CacheError(f"cache {lengths.index(0)} of {len(lengths)} is empty. Join caches that hold a prompt.")
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise CacheError(f"cache {i} of {len(kinds)} is of another model or method than cache 0. Join those alike.")


def joined_layers(parts: Sequence[Sequence[Any]], table: TokenTable) -> list[Any]:
    """Layer by layer, the rows of all."""
    found: list[Any] = []
    for layers in zip(*parts, strict=True):
        if isinstance(layers[0], CompressedLayer):
            found.append(_joined(layers, table, _base(layers[0], parts[0], found)))
        else:
            found.append(joined_passed(layers, table.length))
    return found


def layers_of_row(layers: Sequence[Any], number: int, table: TokenTable) -> list[Any]:
    """Layer by layer, one row alone."""
    found: list[Any] = []
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            found.append(_row(layer, number, table, _base(layer, layers, found)))
        else:
            found.append(passed_row(layer, number, table.length))
    return found


def _base(layer: CompressedLayer, old: Sequence[Any], new: Sequence[Any]) -> CompressedLayer | None:
    """The new layer in the place of the one that this layer follows."""
    place = next((i for i, other in enumerate(old) if other is layer.base), None)
    found = None if place is None else new[place]
    assert found is None or isinstance(found, CompressedLayer)
    return found


def _joined(layers: Sequence[CompressedLayer], table: TokenTable, base: CompressedLayer | None) -> CompressedLayer:
    """The rows of these layers, which are alike, under one table."""
    some, rows = layers[0], [layer.table.rows for layer in layers]
    other = some.like(table, copy.deepcopy(some.watch), base)
    other.seen = table.length
    other.window = Window.joined([layer.window for layer in layers], other.leaves)
    other.sinks = Sinks.joined([layer.sinks for layer in layers], rows)
    other.body = Body.joined([layer.body for layer in layers], rows)
    other.dtype, other.device, other.is_initialized = some.dtype, some.device, True
    other.join_states(layers)
    for layer in layers[1:]:
        if other.watch is not None and layer.watch is not None:
            other.watch.sums = other.watch.sums + layer.watch.sums
    return other


def _row(layer: CompressedLayer, number: int, table: TokenTable, base: CompressedLayer | None) -> CompressedLayer:
    """One row alone, under a table of its own."""
    other = copy.deepcopy(layer, {id(layer.table): table, id(layer.base): base})
    other.seen = table.length
    other.window = layer.window.row(number, other.leaves)
    other.sinks.select(torch.tensor([number]))
    other.body.select(torch.tensor([number]))
    if has_states(other):
        select_states(other, torch.tensor([number]))
    return other
