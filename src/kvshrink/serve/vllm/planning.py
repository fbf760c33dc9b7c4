"""The scheduler's half of the connector: which blocks of a request are in the store, and which are to be put there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvshrink.serve.prefixes import PrefixStore
from kvshrink.serve.settings import key_of, weights_of

TRIES = 2  # loads of one request: what was damaged is deleted when it is met, so that a second one meets less


@dataclass
class Block:
    """One block of a request: its name, its number in the request, and where it is in each group's pool; 0: nowhere."""

    key: str
    index: int
    ids: tuple[int, ...]


@dataclass
class Orders:
    """Of one step. loads: by request; idle: whether the step computes nothing."""

    loads: dict[str, list[Block]] = field(default_factory=dict)
    saves: list[Block] = field(default_factory=list)
    idle: bool = False


@dataclass
class Followed:
    """A request. adapter: what tells its adapter from others; saved: blocks that were looked at; hit: (first, how many)
    blocks that the store has; tries: loads; keys: names of its first blocks."""

    request: Any
    adapter: tuple[str, ...] = ()
    saved: int = 0
    hit: tuple[int, int] = (0, 0)
    tries: int = 0
    keys: list[str] = field(default_factory=list)


class Planner:
    """tokens: of a block; orders: the class of a step's orders."""

    def __init__(self, store: PrefixStore, identity: str, tokens: int, orders: type[Orders] = Orders) -> None:
        self.store, self.identity, self.tokens, self.made = store, identity, tokens, orders
        self.followed: dict[str, Followed] = {}
        self.orders = orders()

    def matched(self, request: Any, computed: int) -> int:
        """Tokens behind the first `computed` that can be loaded. At least one is left to be computed.

        None of a request that was put back: it would go on over its own tokens as they were stored.
        """
        if (own := self.followed.get(request.request_id)) is None:
            own = self.followed[request.request_id] = Followed(request, _adapter(request))
        own.request, first = request, computed // self.tokens
        most = min((request.num_tokens - 1) // self.tokens, len(request.block_hashes))
        last, again = first, own.tries >= TRIES or getattr(request, "num_preemptions", 0) > 0
        while not again and last < most and self._key(own, last) in self.store:
            last += 1
        own.hit = first, last - first
        return (last - first) * self.tokens

    def allocated(self, request: Any, ids: tuple[list[int], ...], tokens: int) -> None:
        """So many tokens are to be loaded into these blocks."""
        own = self.followed.get(request.request_id)
        if own is None or tokens == 0:
            return
        first, count = own.hit[0], tokens // self.tokens
        own.tries += 1
        own.saved = max(own.saved, first + count)  # what was loaded is not stored again
        self.orders.loads[request.request_id] = [self._block(own, n, ids) for n in range(first, first + count)]

    def step(self, output: Any) -> Orders:
        """What is to be done beside this step."""
        orders, self.orders = self.orders, self.made()
        orders.idle = not output.num_scheduled_tokens
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        named: set[str] = set()
        for name, count in output.num_scheduled_tokens.items():
            own = self.followed.get(name)
            if own is None or (ids := output.kv_connector_block_state.get_block_ids(name)) is None:
                continue
            whole = min((computed[name] + count) // self.tokens, len(own.request.block_hashes), *map(len, ids))
            for n in range(min(own.saved, whole), whole):
                block = self._block(own, n, ids)
                if 0 not in block.ids and block.key not in named and block.key not in self.store:
                    named.add(block.key)
                    orders.saves.append(block)
            own.saved = max(own.saved, whole)
        return orders

    def finished(self, name: str) -> None:
        self.followed.pop(name, None)

    def _block(self, own: Followed, n: int, ids: tuple[list[int], ...]) -> Block:
        return Block(self._key(own, n), n, tuple(group[n] for group in ids))

    def _key(self, own: Followed, n: int) -> str:
        """vLLM's hash knows tokens, images, a salt and an adapter's name; what the adapter is comes from its files."""
        for block in own.request.block_hashes[len(own.keys) : n + 1]:
            own.keys.append(key_of(self.identity, bytes(block), *own.adapter))
        return own.keys[n]


def _adapter(request: Any) -> tuple[str, ...]:
    lora = getattr(request, "lora_request", None)
    if lora is None:
        return ()
    folder = Path(lora.lora_path)  # or a hub id
    return (weights_of(folder) if folder.is_dir() else str(lora.lora_path),)
