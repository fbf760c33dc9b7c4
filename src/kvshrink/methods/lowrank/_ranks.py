"""How one budget of ranks is shared between the keys and values of all layers."""

from collections.abc import Sequence


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
