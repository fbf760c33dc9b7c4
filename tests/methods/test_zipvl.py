import math

import numpy as np
import pytest
import torch

from kvshrink.methods._budgets import Mass
from kvshrink.methods.evict.zipvl import ZipVL
from tests.methods.evicting import Rule, Seen, Steps, pages_of, refused


class Massive:
    """ZipVL by hand: how many tokens is said by accumulated attention, which ones by attention per query."""

    def __init__(self, method: ZipVL) -> None:
        self.method, self.got = method, [{}, {}]  # accumulated attention by row and column, of both heads
        asks = method.scorer({}).queries  # which of the others are asked is by lot
        self.rule = Rule(self.importance, lambda n: asks(n).tolist())

    def importance(self, seen: Seen) -> np.ndarray:
        self.got[seen.row] |= {c: seen.mean[:, c] for c in range(seen.first, len(seen.real))}
        return seen.mean

    def counts(self, row: int, candidates: list[dict[int, float]], pages: int) -> list[int]:
        by_head = [sorted((self.got[row][c][n] for c in own), reverse=True) for n, own in enumerate(candidates)]
        reached, total = np.sum(by_head, 0).cumsum(), np.sum(by_head)
        fewest = int(np.nonzero(reached >= self.method.mass * total)[0][0]) + 1
        return [min(math.ceil(fewest / 32), pages_of(pages, self.method.ratio)) * 32] * 2


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("mass", [0.3, 0.6, 0.975])
def test_the_fewest_tokens_that_hold_the_mass_stay(mass, pads):
    method = ZipVL(mass=mass, ratio=0.9)
    own = Massive(method)
    Steps(method, pads=pads, rule=own.rule, counts=own.counts).run(500, 90, *[1] * 40)


def test_the_last_queries_and_as_many_others_are_asked():
    for count in (1, 40, 64, 100, 1000):
        asked = ZipVL(asked=64).scorer({}).queries(count).tolist()
        assert asked == sorted(set(asked))
        assert set(range(max(0, count - 64), count)) <= set(asked)
        assert len(asked) == min(count, 128)
    assert np.mean(asked[:64]) == pytest.approx(468, abs=120), "all over the prompt"


def test_a_budget_of_mass_in_loops():
    """As its text says: the fewest tokens whose importance is that share of all lanes' together."""
    importance = torch.randn(3, 2, 320).mul(1.5).exp()
    importance[0, :, :40] = -torch.inf  # what is no token counts nothing
    for share in (0.1, 0.5, 0.9, 1.0):
        got = Mass(0.5, share).counts(importance, torch.tensor([10, 10, 10]), 32)
        for row in range(3):
            lanes = [sorted((x for x in lane if x > -math.inf), reverse=True) for lane in importance[row].tolist()]
            fewest = next(n for n in range(1, 321) if sum(sum(x[:n]) for x in lanes) >= share * sum(map(sum, lanes)))
            assert got[row].tolist() == [min(-(-fewest // 32), 5) * 32] * 2 or share == 1.0
            assert got[row].tolist() == [160] * 2 or share < 1.0


def test_attention_on_few_tokens_needs_few():
    """Found anew for each prompt: of one whose attention is spread more stays."""
    sharp, flat = ([math.exp(-n / wide) for n in range(320)] for wide in (10, 200))
    counts = [Mass(1.0, 0.9).counts(torch.tensor([[x]]), torch.tensor([10]), 32).item() for x in (sharp, flat)]
    assert counts[0] == 32 < counts[1]


@pytest.mark.parametrize("settings", [{"protect": 60}, {"schedule": "prompt"}, {"merge": True}], ids=str)
def test_settings_of_all_methods(settings):
    method = ZipVL(mass=0.999, ratio=0.25, **settings)  # so that the ratio alone decides how many
    own = Massive(method)
    Steps(method, pads=11, rule=own.rule, counts=own.counts).run(250, 60, *[1] * 40)


def test_settings():
    refused(ZipVL, {"mass": 0.0}, {"mass": 1.1}, {"asked": 0}, {"most": 64}, {"floor": 0.2}, {"ratio": 1.01})
