import numpy as np
import pytest

from kvshrink.methods.evict.scissorhands import Scissorhands
from tests.methods.evicting import MEMBERS, Rule, Seen, Steps, refused


def passed_over(history: int) -> Rule:
    """Minus how many of the last queries of a step gave a token less than an even share of all that they see."""

    def importance(seen: Seen) -> np.ndarray:
        found = np.zeros((2, len(seen.real)))
        for head, of_query in enumerate(seen.weights):
            for x, weights in enumerate(of_query):
                shown = seen.shown[head // MEMBERS, x]
                if shown.any():
                    found[head // MEMBERS] -= shown & (weights < 1 / shown.sum())
        return found

    return Rule(importance, lambda n: range(max(0, n - history), n), keeps="sum")


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("history", [256, 16])
def test_those_that_the_fewest_queries_passed_over_stay(history, pads):
    """The last queries of a prompt and of a chunk count, then those of every step: all are added up."""
    Steps(Scissorhands(ratio=0.3, history=history), pads=pads, rule=passed_over(history)).run(300, 70, *[1] * 70)


def test_history_says_how_many_queries_of_a_prompt_count():
    """With one query a token is passed over at most once by each of its two query heads."""
    for history, most in ((1, 2), (10, 20)):
        steps = Steps(Scissorhands(ratio=0.5, history=history), rule=passed_over(history)).run(200)
        counts = -steps.cache.compressed[0].body.youngest.importance
        assert 0 <= counts.min() < counts.max() <= most


@pytest.mark.parametrize("schedule", ["page", "prompt", 64])
def test_schedules(schedule):
    steps = Steps(Scissorhands(ratio=0.25, history=64, schedule=schedule), rule=passed_over(64)).run(300)
    for _ in range(100):
        steps.run(1)
    held = len(steps.kept()[0][0])
    assert held == {"page": 96, "prompt": 64 + 96, 64: 96 + 64}[schedule]


def test_a_floor_lets_heads_compete_by_how_seldom_they_pass_over():
    steps = Steps(Scissorhands(ratio=0.3, floor=0.0, history=8), pads=20, rule=passed_over(8)).run(400)
    assert any(len(a) != len(b) for a, b in steps.kept())
    steps.run(60, *[1] * 33)


def test_protected_tokens_stay():
    steps = Steps(Scissorhands(ratio=0.1, protect=50), pads=7, rule=passed_over(256)).run(200, 100, *[1] * 40)
    assert set(range(11, 57)) <= set(steps.kept()[0][0])


def test_pads_of_a_later_turn_ask_nothing():
    Steps(Scissorhands(ratio=0.3), pads=9, rule=passed_over(256), gap=(300, 325)).run(300, 100, *[1] * 40)


def test_settings():
    refused(Scissorhands, {"history": 0}, {"ratio": 1.5}, {"protect": -1}, {"most": 31}, {"schedule": "never"})
