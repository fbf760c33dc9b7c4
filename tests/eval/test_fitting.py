"""What a comparison fits: each method once, and its own."""

import pytest

from kvshrink import reference_model
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.methods.lowrank.sals import SALS


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a folder"])
def test_settings_that_python_calls_equal_are_two_methods(tmp_path, stored):
    """`topk=1` is one token, `topk=1.0` all of them; 1 == 1.0 for a dictionary."""
    model, tokenizer = reference_model()
    entries = [
        Entry("one", SALS(topk=1)),
        Entry("all", SALS(topk=1.0)),
        Entry("again", SALS(topk=1)),
        Entry("full", None),
    ]
    text = ["The captain made no change whatever in his dress. " * 40] * 4
    ready = fitted(entries, model, tokenizer, text, tmp_path if stored else None)
    found = [type(e.method.method.topk) for e in ready[:3]]
    assert found == [int, float, int]
    assert ready[0].method is ready[2].method
    assert ready[3] == entries[3]
