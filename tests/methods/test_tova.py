import pytest

from kvshrink.methods.evict.tova import TOVA
from tests.methods.evicting import Rule, Steps, refused

NEWEST = Rule(lambda seen: seen.mass, lambda n: [n - 1], keeps="latest")


@pytest.mark.parametrize("pads", [0, 45])
def test_what_the_newest_query_looks_at_stays(pads):
    """In the mean of all heads; what is stored is judged anew by each newest query, not by what it once got."""
    steps = Steps(TOVA(ratio=0.3), pads=pads, rule=NEWEST).run(300, 70, *[1] * 100)
    assert steps.kept()[0][0] == steps.kept()[0][1], "all heads hold the same"


def test_one_list_of_tokens_is_held_for_all_heads():
    steps = Steps(TOVA(ratio=0.5), rule=NEWEST).run(300)
    assert steps.cache.compressed[0].body.youngest.table.shape[1] == 1


def test_a_token_that_one_query_passes_over_is_gone():
    """Importance is not what a token once was: those kept change where the newest query looks elsewhere."""
    steps, gone = Steps(TOVA(ratio=0.3), rule=NEWEST).run(300), 0
    for _ in range(4):
        before = set(steps.kept()[1][0])
        for _ in range(32):
            steps.run(1)
        gone += len(before - set(steps.kept()[1][0]))
    assert gone > 20


@pytest.mark.parametrize("schedule", ["page", "prompt", 50])
def test_while_decoding_tokens_go_as_the_schedule_says(schedule):
    steps = Steps(TOVA(ratio=0.25, schedule=schedule), rule=NEWEST).run(200, *[1] * 100)
    least = {"page": 64, "prompt": 64 + 96, 50: 96}[schedule]
    assert least <= len(steps.kept()[0][0]) <= {50: 64 + 50}.get(schedule, least)
    steps.run(60)
    assert len(steps.kept()[0][0]) == 96, "a quarter of 320, in whole pages"


def test_protected_tokens_stay_whatever_the_newest_query_says():
    steps = Steps(TOVA(ratio=0.1, protect=50), pads=7, rule=NEWEST).run(200, 100, *[1] * 40)
    assert set(range(11, 57)) <= set(steps.kept()[0][0])


def test_no_more_than_most_tokens_are_held():
    steps = Steps(TOVA(ratio=0.5, most=100), rule=NEWEST).run(300, 70, *[1] * 40)
    assert len(steps.kept()[1][1]) == 96


def test_pads_of_a_later_turn_ask_nothing():
    Steps(TOVA(ratio=0.3), pads=9, rule=NEWEST, gap=(300, 325)).run(300, 100, *[1] * 40)


def test_settings():
    refused(TOVA, {"ratio": -0.1}, {"bits": 16}, {"most": 10}, {"schedule": -3}, {"protect": -1}, {"window": 0})
