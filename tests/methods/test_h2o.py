import pytest

from kvshrink.methods.evict.h2o import H2O
from tests.methods.evicting import Steps


@pytest.mark.parametrize("pads", [0, 45])
def test_attention_adds_up_over_prompt_chunks_and_steps(pads):
    """Against every probability of every step, summed; the kept set changes while decoding."""
    steps, before = Steps(H2O(ratio=0.3), pads=pads), None
    for tokens in (300, 50, *[1] * 100):
        steps.step(tokens)
        steps.check()
        now = steps.kept()
        if before is not None and tokens == 1:
            gone = [
                set(a) - set(b) for old, new in zip(before, now, strict=True) for a, b in zip(old, new, strict=True)
            ]
        before = now
    assert any(gone) or all(c >= pads + 4 for row in before[:1] for columns in row for c in columns)


def test_importance_of_stored_tokens_grows_with_every_step():
    steps = Steps(H2O(ratio=0.5))
    steps.step(200)
    before = steps.cache.compressed[0].body.youngest
    steps.step(1)
    after = steps.cache.compressed[0].body.youngest
    there = before.columns >= 0
    assert (after.importance[there] >= before.importance[there]).all()
    assert (after.importance[there] > before.importance[there]).any()
