import numpy as np
import pytest

from kvshrink.methods.evict.lagkv import LagKV
from tests.methods.evicting import Rule, Seen, Steps, beside_pads, refused


def lagged(lag: int, sinks: int) -> Rule:
    """Rank of each token within its partition of those behind the sinks: how it stands out against what follows."""

    def importance(seen: Seen) -> np.ndarray:
        text = [int(c) for c in np.nonzero(seen.real)[0][sinks:] if c >= seen.first]
        size = min(lag, max(1, len(text) // 2))  # so that something follows, as while decoding
        found = np.ones((2, len(seen.real)))
        for at in range(0, len(text), size):
            own, after = text[at : at + size], text[at + size : at + 2 * size]
            for head in range(2 if after else 0):
                score = np.zeros(len(own))
                for rows in (seen.keys[head], seen.values[head]):
                    low, high = rows[after].min(0), rows[after].max(0)
                    deviation = ((rows[own] - low) / np.maximum(high - low, 1e-6)).std(1, ddof=1)
                    score += np.exp(deviation) / np.exp(deviation).sum() / 2
                found[head, own] = (score.argsort(kind="stable").argsort() + 1) / len(own)
        return found

    return Rule(importance, None)


@pytest.mark.parametrize("pads", [0, 64])
@pytest.mark.parametrize("lag", [32, 16])
def test_in_each_partition_those_that_stand_out_against_the_next_one_stay(lag, pads):
    """Without sinks, and with whole partitions of pads, so that there is one way to count partitions only."""
    Steps(LagKV(ratio=0.3, lag=lag, sinks=0), pads=pads, rule=lagged(lag, 0)).run(300, 70, *[1] * 70)


@pytest.mark.parametrize("pads", [0, 45])
def test_partitions_begin_behind_pads_and_sinks(pads):
    Steps(LagKV(ratio=0.3, lag=16), pads=pads, rule=lagged(16, 4)).run(300)


def test_all_partitions_keep_alike():
    """Also the last ones, of which some tokens leave the window though no whole partition follows."""
    steps = Steps(LagKV(ratio=0.25, sinks=0), rule=lagged(128, 0))
    steps.step(500)
    kept = np.array(steps.kept()[1][0])
    counts = np.histogram(kept, bins=[0, 128, 256, 384, 448])[0] / [128, 128, 128, 64]
    assert counts.max() < 1.5 * counts.min(), f"shares that stay of each partition: {counts}"


def test_pads_change_nothing_of_what_a_token_is_worth():
    np.testing.assert_allclose(*beside_pads(LagKV(ratio=1.0, lag=32), lagged(32, 4)), rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"floor": 0.2}, {"protect": 60}, {"schedule": "prompt"}, {"merge": True}], ids=str
)
def test_settings_of_all_methods(settings):
    Steps(LagKV(ratio=0.25, lag=32, sinks=0, **settings), pads=32, rule=lagged(32, 0)).run(250, 60, *[1] * 40)


def test_settings():
    refused(LagKV, {"lag": 1}, {"ratio": 0.0}, {"floor": 2.0}, {"bits": 7}, {"most": 0})
