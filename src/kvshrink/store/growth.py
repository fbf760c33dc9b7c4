"""How much is taken where tokens come one by one: a little more than is needed, as a function of their number alone."""

PAGE_INDEX, LANE_INDEX = 4, 9  # bytes of a page's first column; of a lane's address of it, and of how full it is


def slots_for(tokens: int, most: int | None = None) -> int:
    """Slots taken for so many tokens: a quarter more at most, in steps of 4 at least and of `most` at most."""
    step = max(4, 2 ** max(0, tokens.bit_length() - 3))
    step = step if most is None else min(most, step)
    found: int = -(-tokens // step) * step
    return found
