"""The body of a layer: encoded pages by age. A method with one tier has one shelf of pages, and none ever moves.

Pages enter the youngest tier. What a tier cannot hold any more moves on, the oldest pages first, by a conversion of
stored tensors (`Codec.truncate`): nothing is decoded, and nothing is rounded a second time. A tier without codecs ends
the ladder: its pages are dropped. Columns ascend from the oldest shelf to the youngest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from kvshrink.methods._roles import Codec, Stored
from kvshrink.methods._tier import Tier
from kvshrink.store.bytes import nbytes
from kvshrink.store.names import under
from kvshrink.store.pages import Block, Pages


class Shelf(NamedTuple):
    """Pages of one age as a step reads them: the first `limit` ones.

    base: pages of the same tokens in the layer that this one follows; their tensors are beside its own in a block.
    """

    codecs: tuple[Codec, Codec]
    pages: Pages
    limit: int
    base: Pages | None = None

    def blocks(self, tokens: int) -> Iterator[Block]:
        own = self.pages.blocks(tokens, self.limit)
        return own if self.base is None else map(_beside, own, self.base.blocks(tokens, self.limit))

    def runs(self) -> Iterator[Block]:
        own = self.pages.runs(self.limit)
        return own if self.base is None else map(_beside, own, self.base.runs(self.limit))

    def stored(self, block: Block) -> tuple[Stored, Stored]:
        """What the key codec and the value codec read of a block."""
        keys = block.part("k.")
        return keys, keys if self.codecs[1].joint else block.part("v.")


@dataclass
class _Age:
    """A tier and the pages in it."""

    tier: Tier
    pages: Pages

    def beyond(self) -> int:
        """Pages that must move on."""
        limit = self.tier.tokens
        return 0 if limit is None else max(0, len(self.pages) - limit // self.pages.page)


class Body:
    """All pages of a layer."""

    def __init__(self, tiers: Sequence[Tier], page: int) -> None:
        self.page = page
        self.ages = [_Age(tier, Pages(page)) for tier in tiers]  # the youngest first

    @property
    def youngest(self) -> Pages:
        return self.ages[0].pages

    @property
    def drops(self) -> bool:
        """Whether pages may be dropped."""
        return self.ages[-1].tier.codecs is None

    @property
    def room(self) -> int | None:
        """Pages that are held at most; None: no limit."""
        if not self.drops:
            return None
        return sum((age.tier.tokens or 0) // self.page for age in self.ages[:-1])

    @property
    def first(self) -> int:
        """The first column that is held."""
        return next(age.pages.first[0] for age in reversed(self.ages) if len(age.pages))

    @property
    def tokens(self) -> int:
        return sum(age.pages.tokens for age in self.ages)

    def __len__(self) -> int:
        return sum(len(age.pages) for age in self.ages)

    def shelves(self) -> list[Shelf]:
        """What is there now, the oldest first. It stays readable while this step appends."""
        held = ((age.tier.codecs, age.pages) for age in reversed(self.ages))
        return [Shelf(codecs, pages, len(pages)) for codecs, pages in held if codecs is not None and len(pages)]

    def append(self, parts: Iterable[Stored], pages: int, column: int) -> None:
        """Add `pages` whole pages that cover the columns from `column` on, from parts as they come."""
        if len(self.ages) == 1:
            self.youngest.append(parts, pages, column)
            return
        for age in self.ages:  # the shelves that this step reads stay as they are
            age.pages = age.pages.copy()
        for part in parts:
            count = next(iter(part.values())).shape[1]
            self.youngest.append([part], count, column)
            column += count * self.page
            self._grow_old()

    def _grow_old(self) -> None:
        for young, old in pairwise(self.ages):
            for extent, first, used in young.pages.take(young.beyond()):
                if old.tier.codecs is not None:
                    old.pages.put(demoted(extent, old.tier.codecs), first, used)

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on. What has grown old stays so."""
        for age in self.ages:
            age.pages.crop(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        for age in self.ages:
            age.pages.map(change)

    def tensors(self) -> list[Tensor]:
        return [t for age in self.ages for _, t in age.pages.tensors()]

    def nbytes(self) -> tuple[int, int]:
        """Bytes of (payload, metadata)."""
        payload: list[Tensor] = []
        side: list[Tensor] = []
        for age in self.ages:
            names = {f"{s}.{n}" for s, c in zip("kv", age.tier.codecs or (), strict=False) for n in c.metadata}
            for name, t in age.pages.tensors():
                (side if name in names else payload).append(t)
        return nbytes(payload), nbytes(side)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors): the youngest tier by itself, as a save of one tier has it, and the older ones."""
        values, tensors = self.youngest.state()
        plain, found = {"pages": values}, {f"pages.{k}": t for k, t in tensors.items()}
        for i, age in enumerate(self.ages[1:]):
            values, tensors = age.pages.state()
            plain |= {f"older.{i}": values}
            found |= {f"older.{i}.{k}": t for k, t in tensors.items()}
        return plain, found

    def restore(self, values: Mapping, tensors: Mapping[str, Tensor]) -> None:
        """From what `state` gave, among other things."""
        for i, age in enumerate(self.ages):
            name = f"older.{i - 1}" if i else "pages"
            own = under(tensors, f"{name}.")
            if name in values:
                age.pages.restore(values[name], own)


def _beside(block: Block, base: Block) -> Block:
    """A block with the tensors of another layer's block of the same tokens, k.codes as k.base.codes."""
    others = {f"{k[:2]}base.{k[2:]}": t for k, t in base.stored.items()}
    return replace(block, stored={**block.stored, **others})


def demoted(extent: Stored, codecs: tuple[Codec, Codec]) -> Stored:
    """A side's tensors that its codec of the older tier keeps."""
    found: dict[str, Tensor] = {}
    for prefix, codec in zip(("k.", "v."), codecs, strict=True):
        own = under(extent, prefix)
        found |= {f"{prefix}{k}": t for k, t in codec.truncate(own).items()}
    return found
