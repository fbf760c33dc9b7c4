"""Lanes of different lengths at rest: a step reads what was stored, and nothing is paid for what is not there."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvshrink.store.lanes import Pages
from kvshrink.store.ragged import Ragged
from tests.store.test_lanes import PAGE, filled, read

COUNTS = {"even": [[2, 2], [2, 2]], "uneven": [[3, 1], [0, 2]]}


def chosen(counts: list[list[int]]) -> Pages:
    """Of pages with every token, these many of each lane; its last page lacks one."""
    pages, there = filled(3, lanes=2), np.arange(3) < np.array(counts)[..., None]
    used = np.where(there, PAGE, 0)
    for (row, lane), n in np.ndenumerate(counts):
        used[row, lane, n - 1 if n else 0] -= bool(n)
    columns = torch.arange(3 * PAGE, dtype=torch.int32).expand(2, 2, -1)
    slots = torch.from_numpy((np.arange(PAGE) < used[..., None]).reshape(2, 2, -1))
    own = replace(
        pages, table=np.where(there, pages.table, 0), used=used.astype(np.uint8), first=np.zeros((2, 3), np.int32),
        columns=columns.masked_fill(~slots, -1), importance=torch.rand(2, 2, 3 * PAGE).masked_fill(~slots, -torch.inf),
    )  # fmt: skip
    return own.narrowed()


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("way", [copy.copy, lambda kept: pickle.loads(pickle.dumps(kept))], ids=["as is", "pickled"])
def test_a_step_reads_what_was_stored(name, way):
    pages = chosen(COUNTS[name])
    kept = way(Ragged.of(pages))
    assert kept.even == (name == "even")
    assert read(kept.pages) == read(pages)
    assert torch.equal(kept.pages.columns, pages.columns)
    there = pages.columns >= 0
    assert torch.equal(kept.pages.importance[there], pages.importance[there])


@pytest.mark.parametrize("name", COUNTS)
def test_an_index_is_as_large_as_what_there_is(name):
    kept = Ragged.of(chosen(COUNTS[name]))
    kept.read.records()
    wide = 0 if kept.even else 9 * np.size(COUNTS[name]) * np.max(COUNTS[name])  # what steps read: no column of a slot
    assert kept.index_bytes == np.sum(COUNTS[name]) * (9 + PAGE * 8) + 4 * 4 + wide


@pytest.mark.parametrize("name", COUNTS)
def test_importance_is_added_to_each_token(name):
    pages = chosen(COUNTS[name])
    more = torch.rand(pages.importance.shape)
    got = Ragged.of(pages).more_important(more).pages
    there = pages.columns >= 0
    assert torch.equal(got.importance[there], (pages.importance + more)[there])
    assert torch.equal(got.columns, pages.columns)
