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
    stored: Mapping[str, Tensor],
    columns: Int[Tensor, "b L t"],
    importance: Float[Tensor, "b L t"],
    index: Int[Tensor, "b L k"],
    move: Move,
) -> Pages:
    """Pages of the slots `index` of stored ones, whose columns and importance these are: new records, one run."""
    page, lanes = pages.page, pages.lanes
    slots = index.clamp_min(0)
    moved = move(stored, slots)
    layout = Layout.of(moved, lanes)
    used = (index >= 0).unflatten(2, (-1, page)).sum(3)
    there = used > 0  # [b, L, p]
    b, _, count = there.shape
    every = torch.empty(b, lanes, count, layout.size, dtype=torch.uint8, device=index.device)
    layout.write(every, moved)
    run = Run(every[there])
    table = np.zeros(there.shape, np.int64)
    table[there.cpu().numpy()] = run.addresses()
    return replace(
        pages,
        table=table,
        used=used.cpu().numpy().astype(np.uint8),
        first=np.zeros((b, count), np.int32),
        layout=layout,
        runs=(run,),
        columns=columns.gather(2, slots).masked_fill(index < 0, -1),
        importance=importance.gather(2, slots).masked_fill(index < 0, -torch.inf),
    )
