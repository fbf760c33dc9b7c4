"""Which tokens leave the window, and when: a function of a row's length alone, whatever the chunks it came in.

Pages are counted from a row's first column. Of a row of n tokens the pages before (n - window) // page have left; one
that a crop has cut short is followed by another one for the rest of its columns, so that pages stay on their grid.
Joined rows are of different lengths: those whose tokens leave in the same slots of the window go together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvshrink.shapes import Bool, Float, Int
from kvshrink.store.tokens import TokenTable


class Leaving(NamedTuple):
    """Slots of the exact tokens that leave in one step. rows: whose, None: all; columns: of the first one, per row."""

    rows: np.ndarray | None
    start: int
    stop: int
    columns: np.ndarray

    def of(self, tensor: Tensor, axis: int = 2) -> Tensor:
        """These slots of these rows."""
        part = tensor.narrow(axis, self.start, self.stop - self.start)
        return part if self.rows is None else part[torch.from_numpy(self.rows).to(tensor.device)]


class Paged(NamedTuple):
    """What leaves, as whole pages. valid: None: all are real tokens; first, used: as `Body.append` has them."""

    keys: Float[Tensor, "b h t d"]
    values: Float[Tensor, "b h t e"]
    valid: Bool[Tensor, "b t"] | None
    first: np.ndarray
    used: np.ndarray


def left(length: np.ndarray, window: int, page: int) -> np.ndarray:
    """How many of a row's columns have left the window."""
    return np.asarray(np.maximum(0, length - window) // page * page)


def quiet(first: int, seen: int, window: int, page: int) -> bool:
    """Whether no page leaves of exact columns from `first` to `seen`, where all rows are alike: so in most steps."""
    return first >= (seen - window) // page * page


def leavings(lengths: np.ndarray, exact: np.ndarray, slots: int, window: int, page: int) -> Iterator[Leaving]:
    """Rows of so many columns, of which the last `exact` are in the last of so many slots."""
    gone = np.maximum(0, left(lengths, window, page) - (lengths - exact))
    start = slots - exact
    keys = np.stack([start, gone, (lengths - exact) % page], 1)
    for key in np.unique(keys[gone > 0], axis=0):
        rows = np.nonzero((keys == key).all(1))[0]
        columns = (lengths - exact)[rows]
        every = len(rows) == len(lengths)
        yield Leaving(None if every else rows, int(key[0]), int(key[0] + key[1]), columns)


def paged(
    leaving: Leaving, keys: Tensor, values: Tensor, positions: Tensor, padded: bool, page: int, lanes: int
) -> Paged:
    """The leaving tokens in whole pages; positions of the same slots, -1 at pads."""
    keys, values = leaving.of(keys), leaving.of(values)
    valid = leaving.of(positions, 1) >= 0 if padded else None
    count, begin = leaving.stop - leaving.start, int(leaving.columns[0]) % page
    head = min(count, page - begin) if begin else 0  # tokens of a page that was cut short
    if head:
        fill = page - head
        keys, values = (
            torch.cat([x[:, :, :head], x.new_zeros(*x.shape[:2], fill, x.shape[3]), x[:, :, head:]], 2)
            for x in (keys, values)
        )
        real = torch.ones(len(keys), count, dtype=torch.bool, device=keys.device) if valid is None else valid
        valid = torch.cat([real[:, :head], real.new_zeros(len(keys), fill), real[:, head:]], 1)
    pages = keys.shape[2] // page
    starts = np.concatenate([[0], head + page * np.arange(pages - 1)]) if head else page * np.arange(pages)
    first = leaving.columns[:, None] + starts
    used = np.full((len(keys), lanes, pages), page, np.uint8)
    if head:
        used[:, :, 0] = head
    return Paged(keys, values, valid, first.astype(np.int32), used)


def spread(x: Tensor, leaving: Leaving, page: int) -> Tensor:
    """Numbers of the leaving tokens, on their last axis, where `paged` puts the tokens; the last one again at gaps."""
    begin = int(leaving.columns[0]) % page
    head = min(x.shape[-1], page - begin) if begin else 0
    if not head:
        return x
    fill = x[..., head - 1 : head].expand(*x.shape[:-1], page - head)
    return torch.cat([x[..., :head], fill, x[..., head:]], -1)


def kinds(whole: Paged, visual: Bool[Tensor, "b t"], page: int) -> np.ndarray:
    """Which pages hold tokens of images alone, bool [b, p]; visual: of the leaving tokens, where `paged` puts them."""
    used = torch.from_numpy(whole.used[:, 0].astype(np.int64)).to(visual.device)
    empty = torch.arange(page, device=visual.device) >= used[..., None]
    return np.asarray((visual.unflatten(1, (-1, page)) | empty).all(2).cpu())


def by_kind(found: np.ndarray) -> Iterator[tuple[bool, np.ndarray, np.ndarray]]:
    """(whether of images, rows, pages) of kinds [b, p]: rows whose pages are alike go together."""
    for pattern in np.unique(found, axis=0):
        rows = np.nonzero((found == pattern).all(1))[0]
        for visual in np.unique(pattern):
            yield bool(visual), rows, np.nonzero(pattern == visual)[0]


def picked(x: Tensor, rows: np.ndarray, pages: np.ndarray, page: int, axis: int) -> Tensor:
    """These pages of these rows of a tensor whose axis is slots."""
    slots = torch.from_numpy((pages[:, None] * page + np.arange(page)).reshape(-1)).to(x.device)
    return x[torch.from_numpy(rows).to(x.device)].index_select(axis, slots)


def cut(whole: Paged, start: int, stop: int, page: int) -> Paged:
    """The pages from `start` to `stop`."""
    part = slice(start * page, stop * page)
    valid = None if whole.valid is None else whole.valid[:, part]
    return Paged(
        whole.keys[:, :, part],
        whole.values[:, :, part],
        valid,
        whole.first[:, start:stop],
        whole.used[:, :, start:stop],
    )


def own_columns(part: Paged, page: int) -> Int[Tensor, "b t"]:
    """A row's own column of every slot."""
    slots = part.first[:, :, None] + np.arange(page)
    return torch.from_numpy(slots.reshape(len(slots), -1)).to(part.keys.device)


def of_images(table: TokenTable, columns: Int[Tensor, "b t"], rows: np.ndarray) -> Bool[Tensor, "b t"]:
    """Which of these rows' own columns are tokens of images."""
    visual = table.visual
    assert visual is not None
    shifts = np.zeros(len(rows), np.int64) if table.shifts is None else table.shifts[rows]
    own = columns.to(visual.device).long()
    at = own + torch.from_numpy(shifts[:, None]).to(visual.device)
    found = visual[torch.from_numpy(rows).to(visual.device)].gather(1, at.clamp(0, visual.shape[1] - 1))
    return (found & (own >= 0)).to(columns.device)
