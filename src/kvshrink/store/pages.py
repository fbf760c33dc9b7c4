"""Encoded tokens in pages of equal size, never encoded again and hardly ever copied.

Every stored tensor has shape [b, p, ...], p pages. A prefill becomes one extent of many pages. Decoding adds extents of
one page, and each 16 of less than 16 pages are joined, and each 16 of less than 256, so that a page is copied at most
twice while a sequence grows and there are never many extents; the 16 that are joined are held twice for that moment.
Readers get blocks, which are views of extents or, where these are short, joined for the length of one read. `crop` may
cut a page short; it then stays short, and the next starts anew.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvshrink.store.names import under

Stored = Mapping[str, Tensor]

JOINED = 16  # extents of a size that become one
LONG = JOINED**2  # pages of an extent that is never joined to another


@dataclass(frozen=True)
class Block:
    """Some consecutive pages. `columns`: a slice if they cover a run of columns in full, else one per slot or -1."""

    stored: Stored
    columns: slice | Tensor
    tokens: int  # slots in the block, dead ones included

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without it."""
        return under(self.stored, prefix)


class Pages:
    """A growing list of pages of `page` tokens each."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.extents: list[dict[str, Tensor]] = []
        self.first: list[int] = []  # column of each page's first token
        self.used: list[int] = []  # tokens of each page that are still valid

    def __len__(self) -> int:
        return len(self.first)

    @property
    def tokens(self) -> int:
        return sum(self.used)

    def append(self, parts: Iterable[Stored], pages: int, column: int) -> None:
        """Add `pages` whole pages that cover the columns from `column` on, as one extent, from parts as they come."""
        extent: dict[str, Tensor] = {}
        at = 0
        for part in parts:
            count = _pages(part)
            if count == pages:
                extent = dict(part)
            elif not extent:
                extent = {k: t.new_empty(t.shape[0], pages, *t.shape[2:]) for k, t in part.items()}
            if count < pages:
                for name, t in part.items():
                    extent[name][:, at : at + count] = t
            at += count
        self.put(extent, [column + i * self.page for i in range(pages)], [self.page] * pages)

    def put(self, extent: Stored, first: list[int], used: list[int]) -> None:
        """Add one extent, whose pages begin at these columns and hold so many tokens."""
        self.extents.append(dict(extent))
        self.first += first
        self.used += used
        self._join()

    def take(self, count: int) -> Iterator[tuple[Stored, list[int], list[int]]]:
        """Remove the oldest `count` pages and give them as `put` wants them."""
        while count:
            extent = self.extents.pop(0)
            pages = min(count, _pages(extent))
            if pages < _pages(extent):  # clone, so that neither part keeps the other's bytes
                self.extents.insert(0, {k: t[:, pages:].clone() for k, t in extent.items()})
                extent = {k: t[:, :pages].clone() for k, t in extent.items()}
            first, used = self.first[:pages], self.used[:pages]
            del self.first[:pages], self.used[:pages]
            count -= pages
            yield extent, first, used

    def copy(self) -> "Pages":
        """Another list of the same pages, which stays as it is when this one changes."""
        other = Pages(self.page)
        other.extents, other.first, other.used = list(self.extents), list(self.first), list(self.used)
        return other

    def _join(self) -> None:
        """Make one extent of the last ones where enough of them are alike in size."""
        for limit in (JOINED, LONG):
            last = self.extents[-JOINED:]
            if len(last) == JOINED and all(limit // JOINED <= _pages(e) < limit for e in last):
                self.extents[-JOINED:] = [_joined(last)]

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on; nothing is encoded again."""
        self.used = [max(0, min(u, length - f)) for f, u in zip(self.first, self.used, strict=True)]
        keep = next((i for i, u in enumerate(self.used) if u == 0), len(self))
        del self.first[keep:], self.used[keep:]
        extents, self.extents = self.extents, []
        for extent in extents:
            pages = min(keep, next(iter(extent.values())).shape[1])
            keep -= pages
            if pages:
                # clone, so that the pages cut off are really freed
                whole = all(t.shape[1] == pages for t in extent.values())
                self.extents.append(extent if whole else {k: t[:, :pages].clone() for k, t in extent.items()})

    def part(self, start: int, count: int) -> Stored:
        """Tensors of `count` pages from page `start` on."""
        held, at = [], 0
        for extent in self.extents:
            pages = _pages(extent)
            first, last = max(start - at, 0), min(start + count - at, pages)
            if first < last:
                held.append({k: t[:, first:last] for k, t in extent.items()})
            at += pages
        return _joined(held)

    def blocks(self, tokens: int, limit: int | None = None) -> Iterator[Block]:
        """The first `limit` pages (default all) in order, about `tokens` slots at a time."""
        limit = len(self) if limit is None else limit
        per_block, start = max(1, tokens // self.page), 0
        held: list[dict[str, Tensor]] = []
        for extent in self.extents:
            count = next(iter(extent.values())).shape[1]
            at = 0
            while at < count and start + sum(_pages(e) for e in held) < limit:
                room = per_block - sum(_pages(e) for e in held)
                take = min(room, count - at, limit - start - sum(_pages(e) for e in held))
                held.append({k: t[:, at : at + take] for k, t in extent.items()})
                at += take
                if take == room:
                    yield self._block(held, start)
                    start, held = start + per_block, []
        if held:
            yield self._block(held, start)

    def runs(self, limit: int) -> Iterator[Block]:
        """The first `limit` pages in as few blocks as there are without a copy of more than some pages."""
        held: list[dict[str, Tensor]] = []
        start = at = 0
        for extent in self.extents:
            count = min(_pages(extent), limit - at)
            if count <= 0:
                break
            if held and (count >= JOINED or _pages(held[0]) >= JOINED):
                yield self._block(held, start)
                held, start = [], at
            held.append({k: t[:, :count] for k, t in extent.items()})
            at += count
        if held:
            yield self._block(held, start)

    def _block(self, held: list[dict[str, Tensor]], start: int) -> Block:
        stored = _joined(held)
        count = _pages(stored)
        first, used = self.first[start : start + count], self.used[start : start + count]
        if all(u == self.page for u in used) and first[-1] - first[0] == (count - 1) * self.page:
            columns: slice | Tensor = slice(first[0], first[0] + count * self.page)
        else:
            slot = torch.arange(self.page)
            columns = (torch.tensor(first)[:, None] + slot).masked_fill(slot >= torch.tensor(used)[:, None], -1)
            columns = columns.flatten().to(next(iter(stored.values())).device)
        return Block(stored, columns, count * self.page)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change to every stored tensor: a batch operation, or a move to another device."""
        self.extents = [{k: change(t) for k, t in extent.items()} for extent in self.extents]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of everything stored."""
        return [item for extent in self.extents for item in extent.items()]

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` rebuilds the pages."""
        tensors = {f"{i}.{k}": t for i, extent in enumerate(self.extents) for k, t in extent.items()}
        runs: list[list[int]] = []  # column, pages, tokens of each: pages one after the other that are whole
        for first, used in zip(self.first, self.used, strict=True):
            if runs and runs[-1][2] == used == self.page and first == runs[-1][0] + runs[-1][1] * self.page:
                runs[-1][1] += 1
            else:
                runs.append([first, 1, used])
        return {"runs": runs, "extents": [_pages(e) for e in self.extents]}, tensors

    def restore(self, values: Mapping, tensors: Mapping[str, Tensor]) -> None:
        self.first = [column + i * self.page for column, pages, _ in values["runs"] for i in range(pages)]
        self.used = [used for _, pages, used in values["runs"] for _ in range(pages)]
        self.extents = [{} for _ in values["extents"]]
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            self.extents[int(index)][key] = tensor


def _joined(extents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return extents[0] if len(extents) == 1 else {k: torch.cat([e[k] for e in extents], 1) for k in extents[0]}


def _pages(stored: Stored) -> int:
    return next(iter(stored.values())).shape[1]
