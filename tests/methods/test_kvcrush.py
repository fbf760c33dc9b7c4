import numpy as np
import pytest

from kvshrink.methods.evict.kvcrush import KVCrush
from tests.methods.evicting import Rule, Seen, Steps, refused, smooth


def crushed(method: KVCrush) -> Rule:
    """Heavy hitters first, then one token of each bucket of those with like signs, then the rest, by attention."""

    def importance(seen: Seen) -> np.ndarray:
        own = smooth(seen, method.pool)
        columns = [c for c in range(seen.first, len(seen.real)) if seen.real[c]]
        keep = max(1, round(len(columns) * method.ratio))
        places = max(1, keep - round(keep * method.hitters))
        mean = own.mean(0)

        def best(scores: np.ndarray, count: int) -> set[int]:
            return set(sorted(columns, key=lambda c: (-scores[c], c))[:count])

        heavy, by_head = best(mean, keep - places), [best(scores, keep) for scores in own]
        rest = [c for c in columns if c not in heavy]
        signs = {c: [c in would for would in by_head] for c in rest}
        anchor = [2 * sum(signs[c][n] for c in rest) >= len(rest) for n in range(2)]
        rest.sort(key=lambda c: (sum(a != b for a, b in zip(signs[c], anchor, strict=True)), c))
        count = min(places, len(rest))
        # buckets of as many tokens each, as far as that is possible; the middle one stands for all
        stand = {rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)}
        found = np.zeros((2, len(seen.real)))
        for c in columns:
            found[:, c] = (2.0 if c in heavy else 1.0 if c in stand else 0.0) + mean[c] / mean[columns].max() / 2
        return found

    return Rule(importance, lambda n: range(max(0, n - method.observed), n))


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("settings", [{}, {"hitters": 0.25, "observed": 16, "pool": 5}, {"hitters": 0.9}], ids=str)
def test_heavy_hitters_stay_and_one_token_for_each_bucket_of_others(settings, pads):
    """Judged once, when a token leaves the window. All heads of a layer hold the same tokens."""
    method = KVCrush(ratio=0.3, **settings)
    steps = Steps(method, pads=pads, rule=crushed(method)).run(300, 70, *[1] * 70)
    assert steps.lanes == 1


def test_tokens_of_every_kind_stay_where_hitters_are_few():
    """Of those that no head would keep, which are most of a prompt, some stay: all over the prompt."""
    method = KVCrush(ratio=0.25, hitters=0.0)
    steps = Steps(method, rule=crushed(method)).run(800)
    kept = np.array(steps.kept()[1][0])
    assert np.histogram(kept, bins=8, range=(0, 768))[0].min() >= 10
    by_attention = KVCrush(ratio=0.25, hitters=1.0)
    other = Steps(by_attention, rule=crushed(by_attention)).run(800)
    assert len(set(kept) & set(other.kept()[1][0])) < 0.6 * len(kept)


@pytest.mark.parametrize(
    "settings", [{"protect": 60}, {"schedule": "prompt"}, {"schedule": 20}, {"merge": True}, {"most": 64}], ids=str
)
def test_settings_of_all_methods(settings):
    method = KVCrush(ratio=0.25, **settings)
    Steps(method, pads=11, rule=crushed(method)).run(250, 60, *[1] * 40)


def test_settings():
    refused(KVCrush, {"hitters": -0.1}, {"hitters": 1.1}, {"observed": 0}, {"pool": 4}, {"floor": 0.2}, {"ratio": 0})
