"""Rows that differ in the layer's number alone become one."""

import pytest

from kvshrink.store.alike import merged


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("", []),
        ("a", ["0"]),
        ("aaa", ["0-2, each"]),
        ("aba", ["0, 2, each", "1"]),
        ("aabaab", ["0-1, 3-4, each", "2, 5, each"]),
        ("abababab", ["0, 2, 4, .., 4 layers, each", "1, 3, 5, .., 4 layers, each"]),
    ],
)
def test_layers_that_are_alike_are_one_row(kinds, wanted):
    found = merged((i, [kind, "x"]) for i, kind in enumerate(kinds))
    assert [line[0] for line in found] == wanted
    assert [line[1] for line in found] == list(dict.fromkeys(kinds))
