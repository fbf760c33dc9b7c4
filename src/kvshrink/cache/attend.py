"""Attention over [sinks | body | window + new]: each segment gives its output and log-sum-exp, then they are merged.

The body is read by one fused kernel where there is one for the device and the pages (kernels/decode), else a block at a
time: keys are rebuilt for one block, unless their codec absorbs queries and they stay latent; values stay latent until
after the weighted sum. No full-length K or V of a layer is ever alive.
"""

import torch
from torch import Tensor

from kvshrink.cache.body import Shelf
from kvshrink.cache.chosen import read_chosen
from kvshrink.cache.step import Handle
from kvshrink.cache.view import Mask, Slice, View, visible
from kvshrink.kernels.attention import Running, finish, fold, join, merge, start
from kvshrink.kernels.decode import MOST_ROWS, Turn, fused
from kvshrink.shapes import Float
from kvshrink.store.pages import Block

BLOCK_ELEMENTS = 2**19  # channels * tokens of keys rebuilt at a time: 2 MiB in float32
SCORE_ELEMENTS = 2**22  # scores alive at a time: 16 MiB in float32


def attend(
    query: Float[Tensor, "b q s d"],
    keys: Float[Tensor, "b h w d"],
    values: Float[Tensor, "b h w d"],
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    handle: Handle,
) -> Float[Tensor, "b q s d"]:
    """Attention of s new tokens to everything cached. `mask` covers all columns, bool or additive; None is causal."""
    b, heads, s, _ = query.shape
    h = keys.shape[1]
    # many new tokens come in slices, so that scores stay small; a block of the body is rebuilt once for all slices
    size = max(1, SCORE_ELEMENTS // (b * heads * _block_tokens(handle)))
    slices, shown = [], Mask.of(mask)
    for at in range(0, s, size):
        part = query[:, :, at : at + size].float().mul(scaling)
        slices.append(
            Slice(part.reshape(b, h, -1, part.shape[-1]), View(shown, s, at, part.shape[2], heads // h, handle))
        )
    segments = [_exact(slices, keys, values, softcap), *_body(slices, softcap)]
    merged = [merge(list(parts)).unflatten(2, (heads // h, -1)).flatten(1, 2) for parts in zip(*segments, strict=True)]
    return torch.cat(merged, 2).to(query.dtype)


def rebuild(handle: Handle, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all columns at full width: zero where nothing was stored, anything at (masked) pads."""
    layer, first = handle.layer, handle.first
    b, h, w, d = keys.shape
    all_keys, all_values = keys.new_zeros(b, h, first + w, d), values.new_zeros(b, h, first + w, values.shape[3])
    for shelf, block in ((s, block) for s in handle.shelves for block in s.blocks(_block_tokens(handle))):
        k, v = _keys(block, shelf, handle), shelf.codecs[1].decode(shelf.stored(block)[1], h)
        if isinstance(block.columns, slice):
            all_keys[:, :, block.columns], all_values[:, :, block.columns] = k.to(keys.dtype), v.to(values.dtype)
        else:
            live = block.columns >= 0
            all_keys[:, :, block.columns[live]] = k[:, :, live].to(keys.dtype)
            all_values[:, :, block.columns[live]] = v[:, :, live].to(values.dtype)
    sinks = layer.sinks
    if sinks.columns is not None:
        row, slot = sinks.before(first).nonzero(as_tuple=True)
        column = sinks.columns[row, slot]
        all_keys[row, :, column], all_values[row, :, column] = sinks.keys[row, :, slot], sinks.values[row, :, slot]  # type: ignore[index]
    all_keys[:, :, first:], all_values[:, :, first:] = keys, values
    return all_keys, all_values


Segment = list[tuple[Tensor, Tensor]]  # (output, log-sum-exp) of each slice


def _exact(slices: list[Slice], keys: Tensor, values: Tensor, softcap: float | None) -> Segment:
    """Sinks, window and new tokens, a block at a time; the sinks join the first block, since few tokens cost as much
    as some more."""
    handle = slices[0].view.handle
    sinks = handle.layer.sinks
    states, step = [start(q, values.shape[3]) for q, _ in slices], _block_tokens(handle)
    for at in range(0, keys.shape[2] or int(sinks.columns is not None), step):  # after a crop none may be exact
        k, v = keys[:, :, at : at + step], values[:, :, at : at + step]
        columns = slice(handle.first + at, handle.first + at + k.shape[2])
        with_sinks = at == 0 and sinks.columns is not None
        if with_sinks and sinks.keys is not None and sinks.values is not None:
            k, v = torch.cat([sinks.keys, k], 2), torch.cat([sinks.values, v], 2)
        k, v = k.float(), v.float()
        states = [
            fold(state, q, k, v, seen, softcap, bias)
            for state, (q, view) in zip(states, slices, strict=True)
            for seen, bias in (_shown(view, columns, with_sinks),)
        ]
    return [finish(state) for state in states]


def _shown(view: View, columns: slice, with_sinks: bool) -> tuple[Tensor | None, Tensor | None]:
    """(visibility, bias) of exact columns, behind those of the sinks."""
    seen, bias, sinks = view.columns(columns), view.bias(columns), view.handle.layer.sinks
    if with_sinks and sinks.columns is not None:
        seen = _beside(_sinks_seen(view), seen, sinks.size, columns.stop - columns.start)
        bias = (
            None if bias is None else _beside(view.bias(sinks.columns), bias, sinks.size, columns.stop - columns.start)
        )
    return seen, bias


def _sinks_seen(view: View) -> Tensor | None:
    """Which sinks a slice sees. Those taken in this very step are still in the exact tokens as well."""
    handle = view.handle
    sinks, padded = handle.layer.sinks, handle.layer.table.padded
    assert sinks.columns is not None
    seen = view.columns(sinks.columns if padded else sinks.columns[0])
    if not padded and sinks.full and handle.first >= sinks.size:  # without pads they are the first columns
        return seen
    there = sinks.before(handle.first)[:, None, None]
    return there if seen is None else seen & there


def _beside(left: Tensor | None, right: Tensor | None, left_size: int, right_size: int) -> Tensor | None:
    """Two visibilities [#b, #h, #x, size], None for all of it, as one; or two biases."""
    if left is None and right is None:
        return None
    some = left if left is not None else right
    assert some is not None
    left = some.new_ones(1, 1, 1, left_size) if left is None else left
    right = some.new_ones(1, 1, 1, right_size) if right is None else right
    rows = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    return torch.cat([x.expand(*rows, -1) for x in (left, right)], -1)


def _body(slices: list[Slice], softcap: float | None) -> list[Segment]:
    """A segment for each age of pages, the oldest first."""
    handle = slices[0].view.handle
    if handle.pages == 0:
        return []
    one = len(slices) == 1 and slices[0].view.count == 1 and slices[0].view.biases is None
    if one and handle.shelves[-1].codecs[0].reads(handle.pages * handle.layer.body.page) is not None:
        return [[part] for part in read_chosen(slices[0], softcap, _block_tokens(handle))]
    return [_shelf(slices, shelf, softcap) for shelf in handle.shelves]


def _shelf(slices: list[Slice], shelf: Shelf, softcap: float | None) -> Segment:
    handle = slices[0].view.handle
    (key_codec, value_codec), heads = shelf.codecs, handle.layer.shape.heads
    if len(slices) == 1 and (parts := _fused(slices[0], shelf, softcap)) is not None:
        out, lse = join(parts)
        return [(value_codec.expand(out, heads), lse)]
    states: list[Running] = [start(q, value_codec.width) for q, _ in slices]
    absorbed = [key_codec.absorb(q) for q, _ in slices]
    queries = [q if a is None else a for a, (q, _) in zip(absorbed, slices, strict=True)]
    for block in shelf.blocks(_block_tokens(handle)):
        keys = _keys(block, shelf, handle) if absorbed[0] is None else key_codec.unpack(block.part("k."))
        latent = value_codec.unpack(shelf.stored(block)[1])
        states = [
            fold(state, q, keys, latent, visible(block, view), softcap, view.bias(block.columns))
            for state, q, (_, view) in zip(states, queries, slices, strict=True)
        ]
        del keys, latent  # not alive beside the next block's
    done = [finish(state) for state in states]
    return [(value_codec.expand(out, heads), lse) for out, lse in done]


def _fused(part: Slice, shelf: Shelf, softcap: float | None) -> Segment | None:
    """(latent output, log-sum-exp) of each run of pages; None if there is no kernel for them."""
    query, view = part
    layer, rope = view.handle.layer, view.handle.rope
    key_codec, value_codec = shelf.codecs
    learns = torch.is_grad_enabled() and query.requires_grad  # kernels have no gradient
    if query.shape[2] > MOST_ROWS or learns or view.biases is not None:
        return None
    asked, found = key_codec.absorb(query), []
    for block in shelf.runs():
        of_keys, of_values = shelf.stored(block)
        keys, values = key_codec.packed(of_keys), value_codec.packed(of_values)
        if keys is None or values is None or (kernel := fused(query.device, keys, values)) is None:
            return None
        turn = None
        if key_codec.site == "k_pre" and rope is not None:
            columns = block.columns if isinstance(block.columns, slice) else block.columns.clamp_min(0)
            turn = Turn(layer.table.positions[:, columns], rope.inv_freq, rope.scaling, rope.interleaved)
        basis = key_codec.expansion
        if basis is None and turn is not None:
            return None
        seen = visible(block, view)
        query_of = query if asked is None else asked
        found.append(kernel(query_of, keys, basis, turn, values, seen, softcap, layer.shape.dtype))
    return found


def _keys(block: Block, shelf: Shelf, handle: Handle) -> Float[Tensor, "b h t d"]:
    """Keys of a block as attention uses them, float32."""
    layer = handle.layer
    keys = shelf.codecs[0].decode(block.part("k."), layer.shape.heads)
    if shelf.codecs[0].site != "k_pre" or handle.rope is None:
        return keys
    columns = block.columns if isinstance(block.columns, slice) else block.columns.clamp_min(0)
    return handle.rope.apply(keys, layer.table.positions[:, columns])


def _block_tokens(handle: Handle) -> int:
    page, shape = handle.layer.body.page, handle.layer.shape
    return max(page, BLOCK_ELEMENTS // shape.width // page * page)
