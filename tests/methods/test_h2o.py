import pytest

from kvshrink.methods.evict.h2o import H2O
from tests.methods.evicting import Steps


@pytest.mark.parametrize("pads", [0, 45])
def test_attention_adds_up_over_prompt_chunks_and_steps(pads):
    """Against every probability of every step, summed; while decoding, tokens that were kept are dropped."""
    steps, before, gone = Steps(H2O(ratio=0.3), pads=pads), None, set()
    for tokens in (300, 50, *[1] * 100):
        steps.step(tokens)
        steps.check()
        now = {(row, head, c) for row in range(2) for head in range(2) for c in steps.kept()[row][head]}
        if tokens == 1 and before is not None:
            gone |= before - now
        before = now
    assert gone
    assert all(c >= pads + 4 for row, _, c in before if row == 0), "neither a pad nor a sink"


def test_importance_of_stored_tokens_grows_with_every_step():
    steps = Steps(H2O(ratio=0.5))
    steps.step(200)
    before = steps.cache.compressed[0].body.youngest
    steps.step(1)
    after = steps.cache.compressed[0].body.youngest
    there = before.columns >= 0
    assert (after.importance[there] >= before.importance[there]).all()
    assert (after.importance[there] > before.importance[there]).any()
