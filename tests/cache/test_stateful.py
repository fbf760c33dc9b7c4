"""Operations on a cache against an oracle of plain token lists (oracle.py), compared after each of them.

KVSHRINK_SEQUENCES sets the number of random sequences over all methods (default 700). Seeds are fixed: runs repeat.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from kvshrink.cache import attend, writing
from kvshrink.methods._roles import Method
from tests.cache.machine import METHODS, Machine
from tests.cache.operations import Copy, Crop, Join, Reload, Reorder, Repeat, Reset, Select, Setup, Split, Update

SEQUENCES = int(os.environ.get("KVSHRINK_SEQUENCES", 700))
PAGE = 8  # instead of 32, so that short sequences fill many pages
PLAIN = Setup(rows=2, window=8, sinks=3, rope=0, groups=1, offset=0, softcap=None, block=24)
STORIES = {  # window 8, pages of 8, 3 sinks: what random sequences reach seldom, or what once went wrong
    "token by token": [Update(1)] * 40,
    "long turns on top of a body": [Update(40), Update(90), Update(80, masked=True), Update(90, own=1)],
    "crop into a page, then on": [Update(40), Crop(19), Update(30), Crop(25), Update(3)],
    "crop to a page's edge": [Update(35), Crop(16), Update(1), Update(30)],
    "crop into the sinks, refill": [Update(40), Crop(38), Update(1), Update(40)],
    "crop everything, begin again": [Update(40), Crop(40), Update(50, pads=(0, 9, 0))],
    "sinks of a padded row in a page": [Update(40, pads=(0, 15, 0)), Update(1), Update(20)],
    "a padded second turn": [Update(30), Update(40, pads=(0, 25, 0)), Update(1), Update(20, pads=(19, 0, 0)), Crop(35)],
    "columns that the mask hides": [Update(40, holes=True), Update(30, holes=True), Crop(40), Update(30, holes=True)],
    "crop into the pads": [Update(40, pads=(0, 30, 0)), Crop(25), Update(40)],
    "only the padded row stays": [Update(30, pads=(0, 21, 0)), Select([1]), Update(30), Update(1)],
    "a cut page is shared by beams": [Update(40), Crop(20), Repeat(), Update(20), Reorder([3, 3, 0, 1]), Update(9)],
    "a copy goes its own way": [Update(40), Copy(), Crop(20), Update(30), Copy(), Reset(), Update(5)],
    "crop into each age": [Update(90), Crop(20), Update(1), Crop(20), Update(30), Crop(60), Update(90), Update(1)],
    "grow old token by token": [Update(50), *[Update(1)] * 60, Reload(), *[Update(1)] * 12, Copy(), Crop(30)],
    "a longer row comes": [Update(40), Join(90), Update(1), Update(30), Crop(20), Update(40)],
    "a shorter row comes": [Update(70), Join(13, rows=2, before=True), *[Update(1)] * 20, Reload(file=True), Update(9)],
    "short ones come together": [Update(5), Join(3), Update(1), Join(2, (1, 0, 0)), *[Update(3)] * 9],
    "rows leave and come back": [
        Update(60, pads=(0, 9, 0)),
        Split([1, 0]),
        Update(5),
        Join(33),
        Split([2, 0, 0]),
        Update(9),
    ],
    "joined beams": [
        Update(50),
        Join(21),
        Repeat(),
        Update(1),
        Reorder([1, 0, 3, 3]),
        *[Update(1)] * 12,
        Copy(),
        Crop(30),
    ],
    "one row of several goes on": [Update(30), Join(70), Update(20), Split([0]), Update(30), Copy(), Update(1)],
    "only the row without sinks stays": [Update(31), Join(1), Reorder([1]), Update(40)],
    "nothing but pads has left": [Update(9, pads=(8, 8, 8)), Reload(), Update(1), Reload(file=True), Update(40)],
    "saved and continued": [Update(40, pads=(3, 0, 0)), Reload(file=True), Update(1), Reload(into_used=True), Crop(9)],
}

TOLD = [n for n in METHODS if n not in ("cskv_lossless", "rtn_raw", "commuting_lossless", "sals_all", "ragged_heads")]

flags = st.booleans()
rows = st.lists(st.integers(0, 3), min_size=1, max_size=3)
sizes = st.one_of(st.integers(1, 3), st.integers(4, 30), st.integers(31, 90))
setups = st.builds(
    Setup,
    rows=st.integers(1, 3),
    window=st.sampled_from([8, 8, 1, 5]),
    sinks=st.sampled_from([3, 3, 0, 12]),
    rope=st.integers(0, 2),
    groups=st.integers(1, 2),
    offset=st.sampled_from([0, 7]),
    softcap=st.sampled_from([None, None, 2.0]),
    block=st.sampled_from([24, 1000, 40]),
)
pads = st.one_of(st.just((0, 0, 0)), st.just((0, 0, 0)), st.tuples(*[st.integers(0, 40)] * 3))
updates = st.builds(Update, sizes, pads, st.sampled_from([False] * 5 + [True]), flags, flags, st.integers(0, 1))
others = st.one_of(
    st.builds(Crop, st.one_of(st.integers(1, 12), st.integers(13, 60)), flags),
    st.builds(Reorder, rows),
    st.builds(Select, rows),
    st.builds(Reload, st.sampled_from([False, False, True]), flags),
    st.sampled_from([Repeat(), Copy(), Copy(), Reset()]),
    st.builds(Join, sizes, pads, st.integers(1, 2), flags),
    st.builds(Split, rows),
)
operations = st.lists(st.one_of(updates, updates, others), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small pages and blocks, so that tiny tensors cross every border."""
    monkeypatch.setattr(Method, "page", PAGE)
    monkeypatch.setattr(writing, "ENCODE_TOKENS", 2 * PAGE)
    for name in ("BLOCK_ELEMENTS", "SCORE_ELEMENTS"):  # each machine sets its own; this restores them
        monkeypatch.setattr(attend, name, getattr(attend, name))


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("name", TOLD)  # of two that differ in bits alone the one that has some
def test_stories(name, story, tmp_path):
    machine = Machine(name, PLAIN, Counter(), tmp_path)
    for op in STORIES[story]:
        machine.apply(op)
    machine.finish()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_random_operations(name, tmp_path, capsys, record_property):
    tally: Counter = Counter()
    count = -(-SEQUENCES // len(METHODS))

    @seed(list(METHODS).index(name))
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(setups, updates, operations)
    def run(setup, first, ops):
        tally["sequences"] += 1
        machine = Machine(name, setup, tally, tmp_path)
        for op in (first, *ops):
            machine.apply(op)
        machine.finish()

    run()
    with capsys.disabled():
        print(f"\n{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(tally.items())))
    assert tally["sequences"] >= count
    record_property("sequences", tally["sequences"])  # summary.py adds them up
