"""Attention over [sinks | body | window + new]: each segment gives its output and log-sum-exp, then they are merged.

The body is read a block at a time: keys are rebuilt for one block, unless their codec absorbs queries and they stay
latent; values stay latent until after the weighted sum.
No full-length K or V of a layer is ever alive.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.cache.layer import Handle
from kvshrink.kernels.attention import Running, finish, fold, merge, start
from kvshrink.shapes import Bool, Float
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
    slices = []
    for at in range(0, s, size):
        part = query[:, :, at : at + size].float().mul(scaling)
        slices.append(
            Slice(part.reshape(b, h, -1, part.shape[-1]), _View(mask, s, at, part.shape[2], heads // h, handle))
        )
    segments = [_exact(slices, keys, values, softcap), *_sinks(slices, softcap), *_body(slices, softcap)]
    merged = [merge(list(parts)).unflatten(2, (heads // h, -1)).flatten(1, 2) for parts in zip(*segments, strict=True)]
    return torch.cat(merged, 2).to(query.dtype)


def rebuild(handle: Handle, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all columns at full width: zero where nothing was stored, anything at (masked) pads."""
    layer, first = handle.layer, handle.first
    b, h, w, d = keys.shape
    all_keys, all_values = keys.new_zeros(b, h, first + w, d), values.new_zeros(b, h, first + w, values.shape[3])
    for block in layer.pages.blocks(_block_tokens(handle), handle.pages):
        k, v = _keys(block, handle), layer.codecs[1].decode(_part(block, "v."), h)  # type: ignore[index]
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


class _View:
    """Which columns a slice of the new tokens may see."""

    def __init__(self, mask: Tensor | None, s: int, at: int, count: int, members: int, handle: Handle) -> None:
        seen, device = handle.layer.seen, handle.layer.table.positions.device
        self.handle, self.members = handle, members
        self.rows: Tensor | None = None  # bool [b or 1, 1 or q, count, columns], None: everything
        if mask is not None:
            rows = mask[:, :, at : at + count]
            self.rows = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        elif s > 1:
            own = torch.arange(seen - s + at, seen - s + at + count, device=device)
            self.rows = (torch.arange(seen, device=device) <= own[:, None])[None, None]

    def columns(self, columns: slice | Tensor) -> Bool[Tensor, "#b #h #x t"] | None:
        """Visibility of these columns (a slice, or an index per slot [t] or per row [b, t]; -1 is taken as 0)."""
        if self.rows is None:
            return None
        rows = self.rows
        if isinstance(columns, slice):
            seen = rows[..., columns]
        elif columns.dim() == 1:
            seen = rows[..., columns.clamp_min(0)]
        else:
            index = columns.clamp_min(0).long()[:, None, None]
            rows = rows.expand(columns.shape[0], -1, -1, -1)
            seen = rows.gather(-1, index.expand(-1, *rows.shape[1:3], -1))
        b, heads, count, t = seen.shape
        if heads == 1:
            return seen.repeat(1, 1, self.members, 1)
        return seen.reshape(b, heads // self.members, self.members * count, t)


class Slice(NamedTuple):
    """Some of the new tokens: their scaled queries, all query heads of a KV head as rows, and what they may see."""

    query: Float[Tensor, "b h x d"]
    view: _View


Segment = list[tuple[Tensor, Tensor]]  # (output, log-sum-exp) of each slice


def _exact(slices: list[Slice], keys: Tensor, values: Tensor, softcap: float | None) -> Segment:
    handle = slices[0].view.handle
    states, step = [start(q, values.shape[3]) for q, _ in slices], _block_tokens(handle)
    for at in range(0, keys.shape[2], step):
        k, v = keys[:, :, at : at + step].float(), values[:, :, at : at + step].float()
        columns = slice(handle.first + at, handle.first + at + k.shape[2])
        states = [
            fold(state, q, k, v, view.columns(columns), softcap)
            for state, (q, view) in zip(states, slices, strict=True)
        ]
    return [finish(state) for state in states]


def _sinks(slices: list[Slice], softcap: float | None) -> list[Segment]:
    handle = slices[0].view.handle
    sinks = handle.layer.sinks
    if sinks.columns is None or sinks.keys is None or sinks.values is None:
        return []
    columns = sinks.columns if handle.layer.table.padded else sinks.columns[0]
    # sinks taken in this very step are still in the exact tokens as well
    there = sinks.before(handle.first)[:, None, None]
    keys, values = sinks.keys.float(), sinks.values.float()
    segment = []
    for query, view in slices:
        seen = view.columns(columns)
        state = start(query, values.shape[3])
        segment.append(finish(fold(state, query, keys, values, there if seen is None else seen & there, softcap)))
    return [segment]


def _body(slices: list[Slice], softcap: float | None) -> list[Segment]:
    handle = slices[0].view.handle
    layer = handle.layer
    if handle.pages == 0 or layer.codecs is None:
        return []
    (key_codec, value_codec), heads = layer.codecs, layer.shape.heads
    states: list[Running] = [start(q, value_codec.width) for q, _ in slices]
    absorbed = [key_codec.absorb(q) for q, _ in slices]
    queries = [q if a is None else a for a, (q, _) in zip(absorbed, slices, strict=True)]
    for block in layer.pages.blocks(_block_tokens(handle), handle.pages):
        keys = _keys(block, handle) if absorbed[0] is None else key_codec.unpack(_part(block, "k."))
        latent = value_codec.unpack(_part(block, "v."))
        states = [
            fold(state, q, keys, latent, _visible(block, view), softcap)
            for state, q, (_, view) in zip(states, queries, slices, strict=True)
        ]
        del keys, latent  # not alive beside the next block's
    done = [finish(state) for state in states]
    return [[(value_codec.expand(out, heads), lse) for out, lse in done]]


def _visible(block: Block, view: _View) -> Tensor | None:
    """Slots of a body block that are tokens (not pads, sinks or cut off) and that the mask shows."""
    layer, columns = view.handle.layer, block.columns
    seen = view.columns(columns)
    there = None
    if layer.table.padded:
        positions = layer.table.positions
        index = (
            torch.arange(columns.start, columns.stop, device=positions.device)
            if isinstance(columns, slice)
            else columns
        )
        there = positions[:, index.clamp_min(0)] >= 0
        if layer.sinks.size and layer.sinks.columns is not None:
            there &= index > layer.sinks.last()
    if not isinstance(columns, slice):
        live = (columns >= 0)[None]
        there = live if there is None else there & live
    if there is None:
        return seen
    there = there[:, None, None]
    return there if seen is None else seen & there


def _keys(block: Block, handle: Handle) -> Float[Tensor, "b h t d"]:
    """Keys of a block as attention uses them, float32."""
    layer = handle.layer
    assert layer.codecs is not None
    keys = layer.codecs[0].decode(_part(block, "k."), layer.shape.heads)
    if layer.codecs[0].site != "k_pre" or handle.rope is None:
        return keys
    columns = block.columns if isinstance(block.columns, slice) else block.columns.clamp_min(0)
    return handle.rope.turn(keys, layer.table.positions[:, columns])


def _part(block: Block, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in block.stored.items() if k.startswith(prefix)}


def _block_tokens(handle: Handle) -> int:
    page, shape = handle.layer.pages.page, handle.layer.shape
    return max(page, BLOCK_ELEMENTS // shape.width // page * page)
