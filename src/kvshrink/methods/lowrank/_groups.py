"""How many KV heads may share a key basis before rebuilding keys, not reading them, sets the pace of decoding.

A decode step reads the stored bytes of every token and rebuilds its keys from the latents of their group: n = KV heads
x head dim channels, each a sum over the group's r latents, 2 n r floating-point operations a token. Both overlap, so a
rebuild that takes no longer than the reading is free. The roofline model (Williams et al., CACM 52(4), 2009) with
measured ceilings. Values are never rebuilt, so that theirs is one
basis, or one of each shard.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvshrink.errors import SettingError
from kvshrink.kernels.ceilings import Ceilings
from kvshrink.methods._settings import require


class Cost(NamedTuple):
    """What one stored token costs a decode step in one layer.

    width: channels of all its KV heads. rank: latents of one group of key heads.
    stored: bytes of keys and values, scales included.
    """

    width: int
    rank: int
    stored: float


def hidden(cost: Cost, ceilings: Ceilings) -> bool:
    """Whether rebuilding a token's keys takes no longer than reading what is stored of it."""
    return 2 * cost.width * cost.rank / ceilings.flops <= cost.stored / ceilings.bandwidth


def heads_per_basis(heads: Sequence[int], costs: Callable[[int], Sequence[Cost]], ceilings: Ceilings) -> int:
    """The largest number of heads in one basis whose rebuild is hidden in every layer; where none is, the smallest.

    heads: KV heads of each layer; the result divides them all. costs: of each layer at so many heads per basis; a
    number for which it raises SettingError (no latent left for a group) is passed over, unless all are.
    """
    least = math.gcd(*heads)
    possible, refused = [], None
    for size in (s for s in range(1, least + 1) if least % s == 0):
        try:
            possible.append((size, all(hidden(cost, ceilings) for cost in costs(size))))
        except SettingError as error:
            refused = error
    if not possible:
        assert refused is not None
        raise refused
    return max((size for size, free in possible if free), default=possible[0][0])


def bases_of(size: int | None, heads: int, shards: int = 1) -> int:
    """Bases of a layer where `size` of its KV heads, None: all of a shard, share one. Raises SettingError if it is no
    divisor."""
    own = shard_heads(shards, heads)
    size = size or own
    where = f"{heads} KV heads" if shards == 1 else f"{own} KV heads of each of {shards} shards"
    require(own % size == 0, f"group_heads={size} with {where}", "Use a divisor of the heads.")
    return heads // size


def shard_heads(shards: int, heads: int) -> int:
    """KV heads of each of so many ranks. Raises SettingError if it is no divisor."""
    require(heads % shards == 0, f"shards={shards} with {heads} KV heads", "Use a divisor of the heads.")
    return heads // shards
