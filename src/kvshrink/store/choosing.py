"""The tokens of each lane that stay: chosen by importance, moved together into as few pages as they fill."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvshrink.kernels.records import Layout
from kvshrink.shapes import Bool, Float, Int
from kvshrink.store.lanes import Pages, Stored
from kvshrink.store.pool import Run

Move = Callable[[Stored, Int[Tensor, "b L k"]], Stored]  # pages made of the slots that an index names


def most_important(importance: Float[Tensor, "b L t"], counts: Int[Tensor, "b L"]) -> Bool[Tensor, "b L t"]:
    """Which tokens stay, so many of each lane. -inf: no token, which never stays."""
    order = importance.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < counts[..., None]) & (importance > -torch.inf)


def slots_of(stays: Bool[Tensor, "b L t"], page: int) -> Int[Tensor, "b L k"]:
    """Slots of the tokens that stay, in order, k in whole pages; -1 behind them."""
    count = stays.sum(-1)
    width = -(-int(count.max()) // page) * page
    index = (~stays).byte().argsort(dim=-1, stable=True)[..., :width]
    index = torch.nn.functional.pad(index, (0, width - index.shape[-1]))
    return index.masked_fill(torch.arange(width, device=index.device) >= count[..., None], -1)


def kept(
    pages: Pages,
    fresh: Mapping[str, Tensor],
    columns: Int[Tensor, "b L k"],
    importance: Float[Tensor, "b L k"],
    stays: Bool[Tensor, "b L t"],
    move: Move,
) -> Pages:
    """The slots that stay of stored pages, and fresh ones with these columns, -1 where there is none: new records of
    all, as few as they fill. fresh: may be empty."""
    assert pages.columns is not None
    assert pages.importance is not None
    before = pages.records()
    stored = {k: torch.cat([before[k], t], 1) for k, t in fresh.items()} or before
    index = slots_of(torch.cat([stays, columns >= 0], 2), pages.page)
    slots = index.clamp_min(0)
    moved = move(stored, slots)
    everything = torch.cat([pages.columns, columns], 2), torch.cat([pages.importance, importance], 2)
    own = [x.gather(2, slots) for x in everything]
    none = Pages.none(pages.page, pages.lanes, len(index))
    return added(none, moved, own[0].masked_fill(index < 0, -1), own[1].masked_fill(index < 0, -torch.inf))


def added(
    pages: Pages, fresh: Mapping[str, Tensor], columns: Int[Tensor, "b L k"], importance: Float[Tensor, "b L k"]
) -> Pages:
    """With fresh pages of slots with these columns behind those that each lane has. Only pages with a token are stored;
    what stands before a -1 is a token."""
    page, lanes = pages.page, pages.lanes
    used = (columns >= 0).unflatten(2, (-1, page)).sum(3).cpu().numpy()
    there = used > 0  # [b, L, p]
    if not there.any():
        return pages if pages.columns is not None else replace(pages, columns=columns, importance=importance)
    layout = Layout.of(fresh, lanes)
    every = torch.empty((*there.shape, layout.size), dtype=torch.uint8, device=columns.device)
    layout.write(every, fresh)
    mask = torch.from_numpy(there).to(columns.device)
    run = Run(every[mask])
    old = pages.counts if len(pages) else np.zeros(there.shape[:2], np.int64)
    count = old + there.sum(2)
    number = np.arange(int(count.max()))
    mine, theirs = number < old[..., None], (number >= old[..., None]) & (number < count[..., None])
    table, filled = np.zeros(mine.shape, np.int64), np.zeros(mine.shape, np.uint8)
    table[theirs], filled[theirs] = run.addresses(), used[there]
    wide = [x.new_full((*mine.shape, page), none) for x, none in ((columns, -1), (importance, -torch.inf))]
    for into, x in zip(wide, (columns, importance), strict=True):
        into[torch.from_numpy(theirs).to(x.device)] = x.unflatten(2, (-1, page))[mask]
    if len(pages):
        assert pages.columns is not None
        assert pages.importance is not None
        held = pages.table != 0
        table[mine], filled[mine] = pages.table[held], pages.used[held]
        for into, x in zip(wide, (pages.columns, pages.importance), strict=True):
            at = torch.from_numpy(held).to(x.device)
            into[torch.from_numpy(mine).to(x.device)] = x.unflatten(2, (-1, page))[at]
    return replace(
        pages,
        table=table,
        used=filled,
        first=np.zeros((len(table), int(number.size)), np.int32),
        layout=layout,
        runs=(*pages.runs, run),
        columns=wide[0].flatten(2),
        importance=wide[1].flatten(2),
    )
