"""A training's loss per step, thinned for the record of a fit."""

from collections.abc import Sequence

POINTS = 100  # at most
DIGITS = 6


def curve(losses: Sequence[float | None], points: int = POINTS) -> list[list[float]]:
    """[step, mean loss of the steps up to it] for up to `points` runs of steps of one length; None losses are left out.

    Means, since one step is one row of text and rows differ more than neighbouring steps do.
    """
    size = -(-len(losses) // points) or 1
    out = []
    for at in range(0, len(losses), size):
        known = [x for x in losses[at : at + size] if x is not None]
        if known:
            out.append([min(at + size, len(losses)), round(sum(known) / len(known), DIGITS)])
    return out
