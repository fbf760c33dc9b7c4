import numpy as np
import pytest

from kvshrink.methods.evict.a2sf import A2SF
from tests.methods.evicting import ADDED, Rule, Seen, Steps, refused


def fading(alpha: float) -> Rule:
    """Attention of every query so far, each times alpha for every token after it."""

    def importance(seen: Seen) -> np.ndarray:
        ages = seen.own[-1] - seen.asked
        weighed = np.einsum("qxt,x->qt", seen.weights, alpha ** ages.astype(float))
        return weighed.reshape(2, -1, weighed.shape[1]).sum(1)

    return Rule(importance, keeps="sum", fade=alpha)


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("decay", [0.95, 0.5])
def test_attention_fades_with_every_token_after_it(decay, pads):
    """Over a prompt, a chunk and single tokens, of which each makes what is stored count less."""
    Steps(A2SF(ratio=0.3, decay=decay), pads=pads, rule=fading(decay)).run(300, 70, *[1] * 70)


def test_early_tokens_win_only_where_nothing_fades():
    """The bias that the paper is about: a token that came early has been seen by more queries."""
    ages = []
    for decay in (1.0, 0.9):
        steps = Steps(A2SF(ratio=0.25, decay=decay), rule=fading(decay)).run(500)
        ages.append(np.mean([c for row in steps.kept() for head in row for c in head]))
    assert ages[0] < ages[1]


def test_without_decay_it_is_h2o():
    Steps(A2SF(ratio=0.3, decay=1.0), pads=45, rule=ADDED).run(200, 60, *[1] * 40)


def test_queries_whose_weight_is_nothing_are_not_asked():
    scorer = A2SF(decay=0.5).scorer({})
    asked = scorer.queries(1000)
    assert asked.tolist() == list(range(970, 1000)), "0.5**29 is above 1e-9, 0.5**30 is not"
    assert np.allclose(scorer.weights(1000), [0.5 ** (999 - q) for q in asked])


@pytest.mark.parametrize("schedule", ["page", "prompt", 40])
def test_a_prompt_is_cut_once_or_the_share_holds_at_any_length(schedule):
    steps = Steps(A2SF(ratio=0.3, schedule=schedule), rule=fading(0.95)).run(300)
    counts = []
    for _ in range(100):
        steps.run(1)
        counts.append(len(steps.kept()[0][0]))
    gone = len(steps.kept()[0][0]) < counts[0] + 96
    assert gone == (schedule != "prompt"), "what is decoded stays until the next prompt"
    steps.run(50)
    assert len(steps.kept()[0][0]) == -(-steps.left(450) // 32 * 3 // 10) * 32


def test_protected_tokens_stay_however_much_has_faded():
    """A chunk so long that decay to the power of its length is 0."""
    steps = Steps(A2SF(ratio=0.05, decay=0.5, protect=40), pads=3, rule=fading(0.5)).run(200, 1100, 40)
    assert set(range(7, 43)) <= set(steps.kept()[0][0])


def test_pads_of_a_later_turn_ask_nothing():
    Steps(A2SF(ratio=0.3), pads=9, rule=fading(0.95), gap=(300, 325)).run(300, 100, *[1] * 40)


def test_settings():
    refused(A2SF, {"decay": 0.0}, {"decay": 1.01}, {"ratio": 0.0}, {"bits": 3}, {"schedule": 0}, {"floor": 2.0})
