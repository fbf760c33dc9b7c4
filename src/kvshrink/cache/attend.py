"""Attention over [sinks | body | window + new]: each segment gives its output and log-sum-exp, then they are merged.

The body is read by one fused kernel where there is one for the device and the pages (kernels/decode), else a block at a
time: keys are rebuilt for one block, unless their codec absorbs queries and they stay latent; values stay latent until
after the weighted sum. No full-length K or V of a layer is ever alive.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvshrink.cache.chosen import read_chosen
from kvshrink.cache.snapshot import Block, HeldRows, Snapshot, TierView
from kvshrink.cache.view import Mask, QueryChunk, Visibility, both, visible
from kvshrink.kernels.attention import Running, finish, fold, merge, start
from kvshrink.kernels.decode import MOST_ROWS, Constant, Turn, left_out
from kvshrink.kernels.rope import wave_table, waves
from kvshrink.methods._codec import Codec
from kvshrink.shapes import Float

BLOCK_ELEMENTS = 2**19  # channels * tokens of keys rebuilt at a time: 2 MiB in float32
SCORE_ELEMENTS = 2**22  # scores alive at a time: 16 MiB in float32


def attend(
    query: Float[Tensor, "b q s d"],
    keys: Float[Tensor, "b h w d"],
    values: Float[Tensor, "b h w e"],
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    snapshot: Snapshot,
    logits: Float[Tensor, " q"] | None = None,
) -> Float[Tensor, "b q s e"]:
    """Attention of s new tokens to everything cached. keys, values: the exact tokens, or the new ones
    where the snapshot holds all of them. `mask` covers all columns, bool or additive; None is causal. logits: of a sink
    that has no token and no value, by query head (gpt-oss)."""
    b, heads, s, _ = query.shape
    h = keys.shape[1]
    # many new tokens come in chunks, so that scores stay small; a block of the body is rebuilt once for all chunks
    size = max(1, SCORE_ELEMENTS // (b * heads * block_tokens(snapshot)))
    chunks, shown = [], Mask.of(mask)
    for at in range(0, s, size):
        part = query[:, :, at : at + size].float().mul(scaling)
        view = Visibility(shown, s, at, part.shape[2], heads // h, snapshot)
        chunks.append(QueryChunk(part.reshape(b, h, -1, part.shape[-1]), view))
    segments = [_exact(chunks, keys, values, softcap), *_body(chunks, softcap)]
    if logits is not None:
        segments.append([_sink(part, logits.float().unflatten(0, (h, -1)), values.shape[3]) for part in chunks])
    merged = [merge(list(parts)).unflatten(2, (heads // h, -1)).flatten(1, 2) for parts in zip(*segments, strict=True)]
    return (merged[0] if len(merged) == 1 else torch.cat(merged, 2)).to(query.dtype)


def attend_all(
    queries: Sequence[Tensor],
    exact: Sequence[tuple[Tensor, Tensor]],
    masks: Sequence[Tensor | None],
    scaling: float,
    softcap: float | None,
    snapshots: Sequence[Snapshot],
) -> list[Tensor]:
    """Attention of a server's batch: independent caches, each with its queries [b, q, s, d], keys and values as for
    `attend`, mask and snapshot, of any lengths."""
    parts = zip(queries, exact, masks, snapshots, strict=True)
    return [attend(query, *pair, mask, scaling, softcap, snapshot) for query, pair, mask, snapshot in parts]


def rebuild(snapshot: Snapshot, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all columns at full width: zero where nothing was stored, anything at (masked) pads. keys and
    values as for `attend`."""
    first = snapshot.first
    if snapshot.held is not None:
        keys, values = snapshot.held.rows()
    b, h, w, d = keys.shape
    all_keys, all_values = keys.new_zeros(b, h, first + w, d), values.new_zeros(b, h, first + w, values.shape[3])
    for tier, block in ((t, block) for t in snapshot.tiers for block in t.blocks(block_tokens(snapshot))):
        k, v = keys_of(block, tier, snapshot), tier.codecs[1].decode(tier.stored(block)[1], h)
        columns = snapshot.columns(block)
        for whole, rows in ((all_keys, k), (all_values, v)):
            if isinstance(columns, slice):
                whole[:, :, columns] = rows.to(whole.dtype)
            else:
                by_head = columns.repeat_interleave(h // columns.shape[1], 1)
                row, head, slot = (by_head >= 0).nonzero(as_tuple=True)
                whole[row, head, by_head[row, head, slot].long()] = rows[row, head, slot].to(whole.dtype)
    sinks = snapshot.sinks
    if sinks is not None:
        row, slot = (sinks.columns >= 0).nonzero(as_tuple=True)
        column = sinks.columns[row, slot].long()
        all_keys[row, :, column], all_values[row, :, column] = sinks.keys[row, :, slot], sinks.values[row, :, slot]
    if snapshot.starts is None:
        all_keys[:, :, first:], all_values[:, :, first:] = keys, values
    else:
        for i, begin in enumerate(snapshot.starts.tolist()):
            for whole, exact in ((all_keys, keys), (all_values, values)):
                whole[i, :, first + begin :] = exact[i, :, begin:]
    return all_keys, all_values


Segment = list[tuple[Tensor, Tensor]]  # (output, log-sum-exp) of each chunk


def _exact(chunks: list[QueryChunk], keys: Tensor, values: Tensor, softcap: float | None) -> Segment:
    """Sinks, window and new tokens, a block at a time; the sinks join the first block, since few tokens cost as much
    as some more."""
    snapshot = chunks[0].view.snapshot
    sinks = snapshot.sinks
    if snapshot.held is not None:
        if len(chunks) == 1 and (part := _held(chunks[0], snapshot.held, softcap)) is not None:
            return [part]
        keys, values = snapshot.held.rows()
    states, step = [start(q, values.shape[3]) for q, _ in chunks], block_tokens(snapshot)
    for at in range(0, keys.shape[2] or int(sinks is not None), step):  # after a crop none may be exact
        k, v = keys[:, :, at : at + step], values[:, :, at : at + step]
        columns = slice(snapshot.first + at, snapshot.first + at + k.shape[2])
        with_sinks = at == 0 and sinks is not None
        if with_sinks and sinks is not None:
            k, v = torch.cat([sinks.keys, k], 2), torch.cat([sinks.values, v], 2)
        k, v = k.float(), v.float()
        states = [
            fold(state, q, k, v, seen, softcap, bias)
            for state, (q, view) in zip(states, chunks, strict=True)
            for seen, bias in (_shown(view, columns, with_sinks),)
        ]
    return [finish(state) for state in states]


def _held(part: QueryChunk, held: HeldRows, softcap: float | None) -> tuple[Tensor, Tensor] | None:
    """All exact tokens in one operation; None without a kernel, or where the chunk does not see all of them."""
    query, view = part
    if view.rows is not None or view.biases is not None or query.shape[2] > MOST_ROWS:
        return None
    return held.attend(query, view.snapshot, softcap)


def _sink(part: QueryChunk, logits: Float[Tensor, "h m"], width: int) -> tuple[Tensor, Tensor]:
    """What takes a share of the attention and gives nothing."""
    query, view = part
    found = logits[..., None].expand(-1, -1, view.count).flatten(1)[None, ..., None]
    return query.new_zeros(*query.shape[:3], width), found.expand(len(query), -1, -1, -1)


def _shown(view: Visibility, columns: slice, with_sinks: bool) -> tuple[Tensor | None, Tensor | None]:
    """(visibility, bias) of exact columns, behind those of the sinks."""
    seen, bias, sinks = view.columns(columns), view.bias(columns), view.snapshot.sinks
    starts = view.snapshot.starts
    if starts is not None:
        slots = torch.arange(columns.start, columns.stop, device=starts.device) - view.snapshot.first
        own = (slots >= starts[:, None])[:, None, None]
        seen = own if seen is None else seen & own
    if with_sinks and sinks is not None:
        size = columns.stop - columns.start
        seen = _beside(_sinks_seen(view), seen, sinks.size, size)
        if bias is not None:
            bias = _beside(view.bias(sinks.columns[:, None]), bias, sinks.size, size)
    return seen, bias


def _sinks_seen(view: Visibility) -> Tensor | None:
    """Which sinks a chunk sees."""
    sinks = view.snapshot.sinks
    assert sinks is not None
    if sinks.simple:
        return view.columns(slice(0, sinks.size))
    seen, there = view.columns(sinks.columns[:, None]), (sinks.columns >= 0)[:, None, None]
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


def _body(chunks: list[QueryChunk], softcap: float | None) -> list[Segment]:
    """A segment for each age of pages, the oldest first."""
    snapshot = chunks[0].view.snapshot
    if not snapshot.tiers:
        return []
    one = len(chunks) == 1 and chunks[0].view.count == 1 and chunks[0].view.biases is None
    if one and snapshot.tiers[-1].codecs[0].reads(snapshot.pages * snapshot.page) is not None:
        return [[part] for part in read_chosen(chunks[0], softcap, block_tokens(snapshot))]
    return [_tier(chunks, tier, softcap) for tier in snapshot.tiers]


def _tier(chunks: list[QueryChunk], tier: TierView, softcap: float | None) -> Segment:
    snapshot = chunks[0].view.snapshot
    (key_codec, value_codec), heads = tier.codecs, snapshot.shape.heads
    if len(chunks) == 1 and (part := _fused(chunks[0], tier, softcap)) is not None:
        out, lse = part
        return [(value_codec.expand(out, heads), lse)]
    states: list[Running] = [start(q, value_codec.width) for q, _ in chunks]
    absorbed = [key_codec.absorb(q) for q, _ in chunks]
    queries = [q if a is None else a for a, (q, _) in zip(absorbed, chunks, strict=True)]
    if (constant := key_codec.constant) is not None:
        form = (0, False) if (rope := snapshot.rope) is None else (len(rope.inv_freq), rope.interleaved)
        more = [waves(q, constant, *form) for q, _ in chunks]
        queries = [torch.cat(both, 3) for both in zip(queries, more, strict=True)]
    for block in tier.blocks(block_tokens(snapshot)):
        if constant is not None:
            keys = _beside_waves(block, key_codec, absorbed[0] is not None, snapshot)
        else:
            keys = keys_of(block, tier, snapshot) if absorbed[0] is None else key_codec.unpack(block.part("k."))
        latent = value_codec.unpack(tier.stored(block)[1])
        columns = snapshot.columns(block)
        states = [
            fold(state, q, keys, latent, visible(block, view), softcap, view.bias(columns))
            for state, q, (_, view) in zip(states, queries, chunks, strict=True)
        ]
        del keys, latent  # not alive beside the next block's
    done = [finish(state) for state in states]
    return [(value_codec.expand(out, heads), lse) for out, lse in done]


def _fused(part: QueryChunk, tier: TierView, softcap: float | None) -> tuple[Tensor, Tensor] | None:
    """(latent output, log-sum-exp) of all pages; None if there is no kernel for them."""
    query, view = part
    snapshot, (key_codec, _) = view.snapshot, tier.codecs
    rope = snapshot.rope
    learns = torch.is_grad_enabled() and query.requires_grad  # kernels have no gradient
    if query.shape[2] > MOST_ROWS or learns or view.biases is not None or left_out():
        return None
    kernel, basis = tier.kernel.kernel, key_codec.expansion
    turns = key_codec.site == "k_pre" and rope is not None
    if kernel is None or (turns and (basis is None or tier.pages.lanes > 1)):
        return None
    keys, values = tier.packed
    whole = tier.block(0, len(tier.pages))
    live, there = snapshot.live(tier)
    seen = both(None if view.rows is None else view.columns(snapshot.columns(whole)), there, view)
    turn = turn_of(snapshot, whole) if turns or key_codec.constant is not None else None
    if turn == "mixed":
        return None
    constant = None
    if key_codec.constant is not None:
        constant, turn = Constant(query, key_codec.constant, turn), None
    asked = key_codec.absorb(query)
    query, dtype = query if asked is None else asked, snapshot.shape.dtype
    out: tuple[Tensor, Tensor] = kernel(query, keys, basis, turn, values, seen, softcap, dtype, live, constant)
    return out


def turn_of(snapshot: Snapshot, block: Block) -> Turn | Literal["mixed"] | None:
    """RoPE of a block's slots; "mixed" where they were turned by different frequencies."""
    rope = snapshot.rope
    if rope is None:
        return None
    alike = rope.alike(snapshot.positions_of(snapshot.columns(block)))
    return "mixed" if alike is None else Turn(*alike, rope.scaling, rope.interleaved)


def keys_of(block: Block, tier: TierView, snapshot: Snapshot) -> Float[Tensor, "b h t d"]:
    """Keys of a block as attention uses them, float32."""
    codec = tier.codecs[0]
    keys = codec.decode(block.part("k."), snapshot.shape.heads)
    if codec.constant is not None:
        return keys + snapshot.turned(codec.constant[:, None].expand_as(keys), snapshot.columns(block))
    if codec.site != "k_pre" or snapshot.rope is None:
        return keys
    return snapshot.turned(keys, snapshot.columns(block))


def _beside_waves(block: Block, codec: Codec, latent: bool, snapshot: Snapshot) -> Float[Tensor, "b G t r"]:
    """Keys of a block less their constant, as latents or rows, and beside them what its part of a score is made of."""
    stored, rope = block.part("k."), snapshot.rope
    keys = codec.unpack(stored) if latent else codec.decode(stored, snapshot.shape.heads)
    none = keys.new_zeros(len(keys), keys.shape[2], 0)
    turns = (none, none) if rope is None else rope.cos_sin(snapshot.positions_of(snapshot.columns(block)))
    return torch.cat([keys, wave_table(*turns).expand(len(keys), keys.shape[1], -1, -1)], 3)


def block_tokens(snapshot: Snapshot) -> int:
    page, shape = snapshot.page, snapshot.shape
    return max(page, BLOCK_ELEMENTS // shape.width // page * page)
