"""How one budget of ranks is shared between the keys and values of all layers."""

import math
from collections.abc import Sequence

from kvshrink.errors import SettingError


def in_proportion(total: int, weights: Sequence[float], most: int) -> list[int]:
    """`total` units in proportion to the weights, each at least 1 and at most `most`; they sum to `total`.

    What a bound takes or gives is shared by the rest in the same proportion; fractions of a unit go to the largest.
    """
    assert len(weights) <= total <= most * len(weights)
    weights = weights if any(weights) else [1.0] * len(weights)

    def at(scale: float) -> list[float]:
        return [min(max(scale * w, 1.0), float(most)) for w in weights]

    low, high = 0.0, most / min(w for w in weights if w > 0)
    for _ in range(200):  # halved until the two are neighbours
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    exact = at(low)
    units = [int(x) for x in exact]
    for _ in range(total - sum(units)):
        i = max((i for i in range(len(units)) if units[i] < most), key=lambda i: exact[i] - units[i])
        units[i] += 1
    return units


def by_threshold(kept: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The ranks of the highest threshold that the budget allows: every operand has the least rank that keeps as much.

    kept[s][r]: share of its energy that operand s keeps at rank r, up to its full rank. costs[s][r]: bytes at rank r.
    Each operand has at least rank 1. What is left of the budget is less than the next rank of the operand that keeps
    least.
    """
    ranks = [1] * len(kept)
    left = budget - sum(cost[1] for cost in costs)
    while True:
        open_ = [s for s, rank in enumerate(ranks) if rank < len(kept[s]) - 1]
        if not open_:
            return ranks
        s = min(open_, key=lambda s: kept[s][ranks[s]])
        step = costs[s][ranks[s] + 1] - costs[s][ranks[s]]
        if step > left:
            return ranks
        ranks[s] += 1
        left -= step


def split(keep: float, key_share: float, n: int, groups: int, shards: int = 1) -> tuple[int, int]:
    """(rank of each key group, rank of each shard's values): the one place where channels are rounded, down.

    2 * keep * n channels are shared out; what keys or values cannot take (they have only n) goes to the other.
    Raises SettingError if one of them would have none.
    """
    total = 2 * keep * n
    key = min(max(total * key_share, total - n), n)
    rank_k, rank_v = int(key / groups + 1e-6), int((total - key) / shards + 1e-6)
    if rank_k < 1 or rank_v < 1:
        least = max(groups / key_share, shards / (1 - key_share)) / (2 * n)
        scale = 10 ** (2 - math.floor(math.log10(least)))  # three digits, rounded up so that they are enough
        raise SettingError(
            f"keep={keep} with key_share={key_share} gives key rank {rank_k} and value rank {rank_v} "
            f"of {n} channels. Use keep of at least {math.ceil(least * scale - 1e-6) / scale:g}."
        )
    return rank_k, rank_v
