"""Groups of channels that share a width and a gain: runs of neighbours, and gains where a number is far out.

A gain is the root of the mean square of its group; larger where numbers lie beyond the codes' largest level. A rotation
turns a token that is far out in several directions, as the commonest words are, into one number that is far out in one;
at the gain that suits the others it would be cut, in every page that has the word.
"""

from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from kvshrink.kernels.latents import code_of, level_table
from kvshrink.shapes import Float

FACTORS = (1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.1, 2.5, 3.0, 4.0)
# in codes whose error of a unit normal number is below FINE (4 bits) what is cut counts CUT times: it is the same for
# every such token and leans one way
FINE, CUT = 0.02, 3.0
FAR = 1.1  # times the largest level: nearer numbers are cut in every normal page, and the levels are made for that


def runs_of(sizes: tuple[int, ...], bits: tuple[int, ...]) -> list[tuple[int, slice]]:
    """(bits, channels) of neighbouring groups of one width."""
    out, at = [], 0
    for width, members in groupby(zip(bits, sizes, strict=True), key=lambda pair: pair[0]):
        channels = sum(size for _, size in members)
        out.append((width, slice(at, at + channels)))
        at += channels
    return out


@cache
def reach(form: str, bits: int) -> tuple[float, float]:
    """(the largest level of such codes, the expected squared error of a unit normal number)."""
    return float(level_table(form)[bits].abs().max()), float(code_of(form, bits).expected_error(bits))


def widened(
    pages: Float[Tensor, "b p G page r"],
    gain: Float[Tensor, "b p G n"],
    reach: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    sizes: tuple[int, ...],
) -> Float[Tensor, "b p G n"]:
    """The gains, larger where what is cut costs more than coarser levels for all.

    sizes: channels of each group, alike but for a smaller last one. reach: its codes' largest level and the expected
    squared error of a unit normal number.
    """
    if not sizes:
        return gain
    most, error = reach
    missing = len(sizes) * sizes[0] - pages.shape[-1]
    if missing:
        pages = torch.nn.functional.pad(pages, (0, missing))
    largest = torch.maximum(pages.amax(3), -pages.amin(3)).unflatten(-1, (len(sizes), -1)).amax(-1)
    far = largest > FAR * most * gain
    if not bool(far.any()):
        return gain
    groups = pages.unflatten(-1, (len(sizes), -1)).movedim(-2, 3)  # [b, p, G, n, page, size], a view
    rows, own = groups[far].flatten(1).abs(), gain[far]  # [m, page * size], [m]
    most, error = (x.expand_as(gain)[far] for x in (most, error))
    weight = torch.where(error < FINE, CUT, 1.0)
    costs = []
    for factor in FACTORS:
        cut = (rows - (factor * most * own)[:, None]).clamp_min(0).square().sum(-1)
        costs.append(weight * cut + rows.shape[-1] * error * (factor * own).square())
    best = torch.stack(costs).argmin(0)
    return gain.masked_scatter(far, own * own.new_tensor(FACTORS)[best])
