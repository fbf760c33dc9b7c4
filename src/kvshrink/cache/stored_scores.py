"""Scores of a few queries with what a layer stores: what stored tokens are ranked by."""

import torch
from torch import Tensor

from kvshrink.cache.attend import block_tokens, keys_of, turn_of
from kvshrink.cache.snapshot import Snapshot, TierView
from kvshrink.kernels.decode import MOST_ROWS, Constant, cpu, left_out
from kvshrink.kernels.scores import cpu as scores
from kvshrink.shapes import Bool, Float

Scored = tuple[Float[Tensor, "b h x t"], Bool[Tensor, "b h t"]]


def stored_scores(
    snapshot: Snapshot, softcap: float | None, query: Float[Tensor, "b h m x d"]
) -> list[tuple[Float[Tensor, "b h m x t"], Bool[Tensor, "b h t"]]]:
    """Of scaled queries with sinks, then with the body's tokens, and which of them are tokens. -inf where none is."""
    rows = query.float().flatten(2, 3)
    found: list[Scored] = []
    if (sinks := snapshot.sinks) is not None:
        there = (sinks.columns >= 0)[:, None].expand(sinks.keys.shape[:3])
        found.append((_capped(rows @ sinks.keys.float().transpose(2, 3), softcap), there))
    for tier in snapshot.tiers:
        part = _fused(rows, tier, snapshot, softcap)
        found += _by_block(rows, tier, snapshot, softcap) if part is None else [(part, part[:, :, 0] > -torch.inf)]
    shape = query.shape[2:4]
    return [(x.masked_fill(~there[:, :, None], -torch.inf).unflatten(2, shape), there) for x, there in found]


def _fused(rows: Tensor, tier: TierView, snapshot: Snapshot, softcap: float | None) -> Float[Tensor, "b h x t"] | None:
    """Of all pages of a tier in one operation; None if there is no kernel for them."""
    codec, constant, keys = tier.codecs[0], None, tier.packed[0]
    turns = codec.site == "k_pre" and snapshot.rope is not None
    if rows.shape[2] > MOST_ROWS or left_out() or keys is None or tier.kernel.kernel is not cpu.decode:
        return None
    live, there = snapshot.live(tier)
    if there is not None or (turns and (codec.expansion is None or tier.pages.lanes > 1)):
        return None
    turn = turn_of(snapshot, tier.block(0, len(tier.pages))) if turns or codec.constant is not None else None
    if turn == "mixed":
        return None
    if codec.constant is not None:
        constant, turn = Constant(rows, codec.constant, turn), None
    asked, dtype = codec.absorb(rows), snapshot.shape.dtype
    query = rows if asked is None else asked
    return scores.scores(query, keys, codec.expansion, turn, softcap, dtype, live, constant)


def _by_block(rows: Tensor, tier: TierView, snapshot: Snapshot, softcap: float | None) -> list[Scored]:
    found, heads = [], snapshot.shape.heads
    for block in tier.blocks(block_tokens(snapshot)):
        keys, there = keys_of(block, tier, snapshot), snapshot.shown(block)
        every = keys.new_ones(keys.shape[:3], dtype=torch.bool)
        shown = every if there is None else every & there.repeat_interleave(heads // there.shape[1], 1)
        found.append((_capped(rows @ keys.transpose(2, 3), softcap), shown))
    return found


def _capped(found: Tensor, softcap: float | None) -> Tensor:
    return found if softcap is None else torch.tanh(found / softcap) * softcap
