import numpy as np
import pytest

from kvshrink.methods.evict.expected_attention import ExpectedAttention
from tests.methods.evicting import MEMBERS, Rule, Seen, Steps, beside_pads, refused, turned


def expected(ahead: int, epsilon: float = 0.0, plain: bool = False) -> Rule:
    """Softmax of what the next queries' logits are in the mean, if they are normal as those of this step are."""

    def importance(seen: Seen) -> np.ndarray:
        there = seen.real[seen.asked]
        exact = np.nonzero(seen.real & (np.arange(len(seen.real)) >= seen.first))[0]
        next_ones = seen.positions[-1] + 1 + np.arange(ahead)
        turns = [np.eye(8) if plain else turned(np.eye(8), np.full(8, p)) for p in next_ones]
        turn = np.mean(turns, 0)  # of rows: x @ turn
        found = np.zeros((2, len(seen.real)))
        for head in range(2 * MEMBERS):
            asked = seen.queries[head, there]
            mean, apart = asked.mean(0), asked - asked.mean(0)
            spread = turn.T @ (apart.T @ apart / len(asked)) @ turn
            keys = seen.keys[head // MEMBERS, exact]
            logits = keys @ (mean @ turn) / 8**0.5 + np.einsum("td,de,te->t", keys, spread, keys) / 2 / 8
            weights = np.exp(logits - logits.max())
            found[head // MEMBERS, exact] += weights / weights.sum() / MEMBERS
        return (found + epsilon) * np.linalg.norm(seen.values, axis=-1) * len(exact)

    return Rule(importance)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("pads", [0, 45])
def test_tokens_that_the_next_queries_are_expected_to_look_at_stay(pads, rope):
    """Mean and covariance before RoPE, turned as the next positions are in the mean. Over chunks and single tokens."""
    method = ExpectedAttention(ratio=0.3, ahead=50)
    Steps(method, pads=pads, rule=expected(50, plain=not rope), turned=rope).run(200, 70, *[1] * 70)


@pytest.mark.parametrize("settings", [{"ahead": 1}, {"ahead": 300, "epsilon": 0.02}, {"epsilon": 5.0}], ids=str)
def test_how_far_ahead_and_how_much_the_values_norm_counts(settings):
    method = ExpectedAttention(ratio=0.3, **settings)
    Steps(method, pads=20, rule=expected(method.ahead, method.epsilon), turned=True).run(300, 50, *[1] * 35)


def test_with_a_large_epsilon_the_largest_values_stay():
    steps = Steps(ExpectedAttention(ratio=0.2, epsilon=1e4), rule=expected(512, 1e4)).run(300)
    sizes = np.linalg.norm(steps.values[1, 0], axis=-1)[4:256]
    assert set(steps.kept()[1][0]) == set((np.argsort(-sizes)[:64] + 4).tolist())


@pytest.mark.parametrize(
    "settings", [{"floor": 0.3}, {"protect": 60}, {"schedule": "prompt"}, {"merge": True}], ids=str
)
def test_settings_of_all_methods(settings):
    """Heads that compete are the paper's best results."""
    rule = expected(32)
    Steps(ExpectedAttention(ratio=0.25, ahead=32, **settings), pads=11, rule=rule, turned=True).run(250, 60, *[1] * 40)


def test_of_a_long_step_some_queries_are_asked_spread_evenly():
    asked = ExpectedAttention().scorer({}).queries(5000)
    assert len(asked) == 2048
    assert asked[0] == 0
    assert asked[-1] == 4999
    assert set(asked.diff().tolist()) == {2, 3}


def test_pads_change_nothing_of_what_a_token_is_worth():
    """So that tokens of a padded prompt and of what comes later compare as they do without pads."""
    method = ExpectedAttention(ratio=1.0, ahead=10)
    np.testing.assert_allclose(*beside_pads(method, expected(10)), rtol=1e-3)


def test_settings():
    refused(ExpectedAttention, {"ahead": 0}, {"ahead": 2**16 + 1}, {"epsilon": -1.0}, {"ratio": 0.0}, {"bits": 1})
