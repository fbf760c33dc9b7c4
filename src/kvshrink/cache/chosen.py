"""Attention of one new token to the tokens of the body that the key codec scores highest.

All tokens get a score, from what the codec reads of them; for the chosen ones alone keys are rebuilt, turned and scored
exactly, and values are unpacked. What is saved is work and reads, never bytes held. Pages that came one by one while
decoding are joined for each of the two passes, and that copy reads them in full.
"""

import torch
from torch import Tensor

from kvshrink.cache.snapshot import Block, TierView
from kvshrink.cache.view import QueryChunk, Visibility, visible
from kvshrink.kernels.attention import finish, fold, start
from kvshrink.shapes import Bool, Float, Int

WIDER = 8  # blocks at a time: only some channels, or some tokens, of a block are ever alive


def read_chosen(part: QueryChunk, softcap: float | None, block_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(output, log-sum-exp) over the chosen tokens of each age. A row that sees none gives 0 and -inf."""
    query, view = part
    snapshot, tokens = view.snapshot, block_tokens * WIDER
    rope, asked = snapshot.rope, query
    if snapshot.tiers[-1].codecs[0].site == "k_pre" and rope is not None:
        own = snapshot.positions[:, snapshot.seen - 1 : snapshot.seen]
        asked = rope.undo(query, own.expand(-1, query.shape[2]))
    best, counted = _best(asked, view, tokens)
    found, at = [], 0
    for tier in snapshot.tiers:
        value_codec = tier.codecs[1]
        state = start(query, value_codec.width)
        for block in tier.blocks(tokens):
            inside = (best >= at) & (best < at + block.tokens) & counted
            index, live = _front(best - at, inside)
            at += block.tokens
            if not index.shape[1]:
                continue
            live = live[:, None, None]
            seen = visible(block, view)
            if seen is not None:
                seen = seen.expand(len(index), -1, -1, -1)
                live = live & seen.gather(3, index[:, None, None].expand(-1, *seen.shape[1:3], -1))
            values = value_codec.pick(tier.stored(block)[1], index)
            state = fold(state, query, _keys(block, tier, view, index), values, live, softcap)
        out, lse = finish(state)
        found.append((value_codec.expand(out, snapshot.shape.heads), lse))
    return found


def _keys(block: Block, tier: TierView, view: Visibility, index: Int[Tensor, "b c"]) -> Float[Tensor, "b h c d"]:
    """Keys of some slots of a block as attention uses them."""
    snapshot, codec = view.snapshot, tier.codecs[0]
    keys = codec.expand(codec.pick(block.part("k."), index), snapshot.shape.heads)
    if codec.site != "k_pre" or snapshot.rope is None:
        return keys
    columns = snapshot.columns(block)
    own = index + columns.start if isinstance(columns, slice) else columns[:, 0].gather(1, index)
    return snapshot.rope.apply(keys, snapshot.positions.gather(1, own.clamp_min(0).long()))


def _best(
    query: Float[Tensor, "b h x d"], view: Visibility, tokens: int
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"]]:
    """Slots of the body with the highest scores, and which of them a row really reads: rows may see fewer."""
    tiers = view.snapshot.tiers
    codec, parts = tiers[-1].codecs[0], []
    for tier, block in ((t, block) for t in tiers for block in t.blocks(tokens)):
        scores, seen = tier.codecs[0].scores(query, block.part("k.")), visible(block, view)
        # a mask may differ from head to head; a token that any of them sees may be chosen
        parts.append(scores if seen is None else scores.masked_fill(~seen.any(1).any(1), -torch.inf))
    every = torch.cat(parts, 1)
    there = every.isfinite().sum(1).tolist()
    wanted = [n if (k := codec.reads(n)) is None else k for n in there]
    best = every.topk(max(wanted), 1).indices
    ranks = torch.arange(best.shape[1], device=best.device)
    return best, ranks < torch.tensor(wanted, device=best.device)[:, None]


def _front(slots: Int[Tensor, "b k"], inside: Bool[Tensor, "b k"]) -> tuple[Int[Tensor, "b c"], Bool[Tensor, "b c"]]:
    """The slots inside, moved to the front of each row; a row with fewer than another one is filled with slot 0."""
    count = int(inside.sum(1).max())
    order = inside.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    live = inside.gather(1, order)
    return slots.gather(1, order).masked_fill(~live, 0), live
