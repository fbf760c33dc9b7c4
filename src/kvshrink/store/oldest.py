"""The oldest pages of each row apart from the others: what a tier gives to an older one."""

from dataclasses import replace

import numpy as np

from kvshrink.store.lanes import Pages


def oldest(pages: Pages, counts: np.ndarray) -> tuple[Pages, Pages]:
    """(the oldest `counts` [b] pages of each row, the others)."""
    place = np.arange(len(pages))
    old = place < counts[:, None]
    shift = np.minimum(place + counts[:, None], max(0, len(pages) - 1))
    past = place + counts[:, None] >= len(pages)

    def moved(x: np.ndarray) -> np.ndarray:
        index, gone = (shift, past) if x.ndim == 2 else (shift[:, None], past[:, None])
        return np.where(gone, 0, np.take_along_axis(x, np.broadcast_to(index, x.shape), -1))

    assert pages.columns is None
    first = replace(pages, used=np.where(old[:, None], pages.used, 0).astype(np.uint8)).narrowed()
    rest = replace(pages, table=moved(pages.table), used=moved(pages.used), first=moved(pages.first)).narrowed()
    return first, rest
