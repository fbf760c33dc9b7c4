"""What methods share that give important tokens more bits: a share of a page, and two affine forms."""

from kvshrink.methods._packing import Packing, Salient
from kvshrink.methods._packing.salient import STEP, counted
from kvshrink.methods._quantiser import Space, axes
from kvshrink.methods._settings import require


def classes(space: Space, high: int | None, low: int | None, share: float, axis: str) -> Packing:
    """Codes of `high` bits for the share of a page's most important tokens and of `low` for the others (None: floats).

    axis "channel": scales over the tokens of a class; "token": over the channels of a group.
    """
    count = counted(space.page, share)
    one = (
        axes(Space(1, space.width, tokens, space.dtype, space.heads), bits, axis, space.width)
        for bits, tokens in ((high, count), (low, space.page - count))
    )
    return Salient(space.groups, space.width, *one)


def shares(page: int) -> tuple[float, ...]:
    """Every share that a page can be cut at."""
    return tuple(tokens / page for tokens in range(STEP, page, STEP))


def check_share(share: float) -> None:
    """Raise SettingError unless the share is a number between 0 and 1."""
    require(0 < share < 1, f"share={share}", "Use a share of tokens above 0 and below 1.")


def check_order(high: int | None, low: int) -> None:
    """Raise SettingError if important tokens have no more bits than the others."""
    require(high is None or high > low, f"high={high} with low={low}", "Give important tokens more bits.")
