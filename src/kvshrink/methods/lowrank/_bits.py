"""Where the bytes go: widths for the channel groups of an operand, and bytes for the operands of all layers.

An operand is one layer's keys or values. Within it the error is known in closed form, variance x error of the
quantiser, so widths are filled up by the largest fall of error per byte. Between operands nothing but a measurement can
tell what an error costs; there a cost is given at some byte counts, and bytes go where its convex hull falls most.
"""

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from kvshrink.methods._packing.mixed import group_bytes

Operand = TypeVar("Operand", bound=Hashable)
Curve = Sequence[tuple[int, float]]  # (bytes of a page, cost), from 0 bytes on
Error = Callable[[int], float]  # of a unit normal number at so many bits


def fill(
    energies: Sequence[float], sizes: Sequence[int], budget: int, widths: Sequence[int], page: int, error: Error
) -> tuple[int, ...]:
    """Width of each group, in at most `budget` bytes a page. energies: sum of the variances of a group's channels."""
    chosen, left = [0] * len(energies), budget
    steps = [_step(energies[g], sizes[g], 0, widths, page, g, error) for g in range(len(energies))]
    heap = [s for s in steps if s is not None]
    heapq.heapify(heap)
    while heap:
        _, g, width, cost = heapq.heappop(heap)
        if cost > left:
            continue  # a smaller group may still fit
        chosen[g], left = width, left - cost
        if (step := _step(energies[g], sizes[g], width, widths, page, g, error)) is not None:
            heapq.heappush(heap, step)
    return tuple(chosen)


def _step(
    energy: float, size: int, now: int, widths: Sequence[int], page: int, group: int, error: Error
) -> tuple[float, int, int, int] | None:
    """(-fall of error per byte, group, width, bytes more) of the best next width."""
    have = group_bytes(size, now, page)
    best = None
    for width in widths:
        if width > now:
            cost = group_bytes(size, width, page) - have
            fall = energy * (error(now) - error(width)) / cost
            if fall > 0 and (best is None or -fall < best[0]):
                best = (-fall, group, width, cost)
    return best


def cost_of(chosen: Sequence[int], sizes: Sequence[int], page: int) -> int:
    """Bytes of a page at these widths."""
    return sum(group_bytes(size, width, page) for size, width in zip(sizes, chosen, strict=True))


def error_of(chosen: Sequence[int], energies: Sequence[float], error: Error) -> float:
    """Expected squared error at these widths."""
    return sum(e * error(w) for e, w in zip(energies, chosen, strict=True))


def share(curves: Mapping[Operand, Curve], budget: int) -> dict[Operand, int]:
    """Bytes of each operand: down the steepest piece of all convex hulls, until the budget is spent.

    The last piece may be taken in part, so an operand's bytes need not be those of a point of its curve.
    """
    pieces = [(slope, n, operand, size) for n, (operand, c) in enumerate(curves.items()) for slope, size in _hull(c)]
    given, left = dict.fromkeys(curves, 0), budget
    for _, _, operand, size in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        given[operand] += min(size, left)
        left -= min(size, left)
    return given


def _hull(curve: Curve) -> list[tuple[float, int]]:
    """(fall per byte, bytes) of each piece of the lower convex hull, as far as it falls."""
    at, pieces = 0, []
    while at + 1 < len(curve):
        x, y = curve[at]
        slope, to = max(((y - v) / (u - x), i) for i, (u, v) in enumerate(curve[at + 1 :], at + 1))
        if slope <= 0:
            break
        pieces.append((slope, curve[to][0] - x))
        at = to
    return pieces
