"""The scheduler's half of the connector: which blocks of a request are in the store, and which are to be put there."""

from dataclasses import dataclass, field
from typing import Any

from kvshrink.serve.prefixes import PrefixStore
from kvshrink.serve.settings import key_of

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
    """A request. saved: blocks that were looked at; hit: (first, how many) blocks that the store has; tries: loads."""

    request: Any
    saved: int = 0
    hit: tuple[int, int] = (0, 0)
    tries: int = 0


class Planner:
    """tokens: of a block; orders: the class of a step's orders."""

    def __init__(self, store: PrefixStore, identity: str, tokens: int, orders: type[Orders] = Orders) -> None:
        self.store, self.identity, self.tokens, self.made = store, identity, tokens, orders
        self.followed: dict[str, Followed] = {}
        self.orders = orders()

    def matched(self, request: Any, computed: int) -> int:
        """Tokens behind the first `computed` that can be loaded. At least one is left to be computed."""
        own = self.followed.setdefault(request.request_id, Followed(request))
        own.request, first = request, computed // self.tokens
        most = min((request.num_tokens - 1) // self.tokens, len(request.block_hashes))
        last = first
        while own.tries < TRIES and last < most and self._key(request, last) in self.store:
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
        self.orders.loads[request.request_id] = [self._block(request, n, ids) for n in range(first, first + count)]

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
                block = self._block(own.request, n, ids)
                if 0 not in block.ids and block.key not in named and block.key not in self.store:
                    named.add(block.key)
                    orders.saves.append(block)
            own.saved = max(own.saved, whole)
        return orders

    def finished(self, name: str) -> None:
        self.followed.pop(name, None)

    def _block(self, request: Any, n: int, ids: tuple[list[int], ...]) -> Block:
        return Block(self._key(request, n), n, tuple(group[n] for group in ids))

    def _key(self, request: Any, n: int) -> str:
        """vLLM's hash knows tokens, images, a salt and an adapter's name; where the adapter lies is added."""
        adapter = getattr(request, "lora_request", None)
        more = () if adapter is None else (str(adapter.lora_path),)
        return key_of(self.identity, bytes(request.block_hashes[n]), *more)
