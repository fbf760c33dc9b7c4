"""What a test may do to a cache, as plain values that hypothesis can draw, shrink and print."""

from typing import NamedTuple


class Setup(NamedTuple):
    """What stays the same through one sequence of operations."""

    rows: int
    window: int
    sinks: int
    rope: int
    groups: int  # key bases of CSKV
    offset: int  # position of the first token
    softcap: float | None
    block: int  # tokens of the body that attention rebuilds at a time


class Update(NamedTuple):
    """New tokens, the first `pads` of a row left pads; `holes` hides more columns, `masked` gives masks though nothing
    is hidden, as float if `additive`; layer `own` runs our attention, the other one gets everything materialised."""

    tokens: int
    pads: tuple[int, int, int] = (0, 0, 0)
    holes: bool = False
    masked: bool = False
    additive: bool = False
    own: int = 0


class Crop(NamedTuple):
    tokens: int
    by_length: bool = False  # the older convention: the number is the length to keep


class Reorder(NamedTuple):
    rows: list[int]


class Select(NamedTuple):
    rows: list[int]


class Repeat(NamedTuple):
    pass


class Copy(NamedTuple):
    pass


class Reload(NamedTuple):
    file: bool = False
    into_used: bool = False  # load over a cache that holds something else


class Reset(NamedTuple):
    pass


class Join(NamedTuple):
    """Another cache's rows come, which holds so many tokens: behind this one's, or before them."""

    tokens: int
    pads: tuple[int, int, int] = (0, 0, 0)
    rows: int = 1
    before: bool = False


class Split(NamedTuple):
    """Each row a cache of its own. One of them goes on; or some are joined again, in this order."""

    rows: list[int]


Op = Update | Crop | Reorder | Select | Repeat | Copy | Reload | Reset | Join | Split
