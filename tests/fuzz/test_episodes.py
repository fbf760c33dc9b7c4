"""Some random episodes against DynamicCache; `--fuzz 5000` runs as many."""

import pytest

from kvshrink.attach import stage
from kvshrink.cache.cache import KVCache
from tests.fuzz import episodes


def test_episodes_are_as_dynamic_caches_or_refused(fuzz_cases, tmp_path):
    tally = episodes.run(range(fuzz_cases(40)), 0, tmp_path)
    assert not tally.findings, "\n".join(map(str, tally.findings))
    assert tally.within["steps compared"] > tally.within["refused"] > 0


@pytest.mark.parametrize("name", ["reorder_cache", "check_columns"])
def test_a_cache_that_is_wrong_is_found(monkeypatch, tmp_path, name):
    """Episodes notice a cache that does not reorder, and one that says nothing of a mask."""
    if name == "reorder_cache":
        monkeypatch.setattr(KVCache, name, lambda *_: None)
    else:
        monkeypatch.setattr(stage, "check_columns", lambda *_: None)
    assert episodes.run(range(30), 0, tmp_path).findings
