import numpy as np
import pytest
import scipy.stats
import torch

from kvshrink.methods._token_probe import Needed
from kvshrink.methods.evict.kvzap import RIDGE, KVzap, agreement, ridge
from tests.methods.evicting import (
    WIDTH,
    Rule,
    Seen,
    Steps,
    check_generate,
    fitted_to_reference,
    probe_of,
    refused,
)

DRAW = np.random.default_rng(5)
FITTED = {
    "weight": torch.tensor(DRAW.normal(size=(2, WIDTH))).float(),
    "bias": torch.tensor([0.5, -1.0]),
    "least": torch.tensor(1.0),
}


def guessed(seen: Seen) -> np.ndarray:
    """A linear map of the layer's input, of each new token by itself."""
    found = np.zeros((2, len(seen.real)))
    for head in range(2):
        for c, row in zip(seen.own, seen.hidden, strict=True):
            found[head, c] = sum(w * x for w, x in zip(FITTED["weight"][head].tolist(), row, strict=True))
            found[head, c] += float(FITTED["bias"][head])
    return found


def above(least: float):
    """Tokens of each head: those at or above the threshold, in the nearest number of whole pages, a page at least."""

    def of(row: int, candidates: list[dict[int, float]], pages: int) -> list[int]:
        counts = [sum(x >= least for x in own.values()) for own in candidates]
        return [max(1, (n + 16) // 32) * 32 for n in counts]

    return of


RULE = Rule(guessed, None, keeps="own")


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("threshold", [None, -2.0, 4.0, 50.0])
def test_tokens_that_are_guessed_to_be_needed_stay(threshold, pads):
    """The threshold is the fitted one, unless a number is given."""
    method = KVzap(threshold=threshold)
    least = 1.0 if threshold is None else threshold
    steps = Steps(method, pads=pads, rule=RULE, counts=above(least), fitted=FITTED).run(300, 70, *[1] * 40)
    if threshold is None:
        assert any(len(a) != len(b) for a, b in steps.kept()), "as many as are needed, head by head"


def test_what_comes_later_changes_nothing():
    assert KVzap().scorer(FITTED).causal
    known = []
    for chunks in ((400,), (100, 1, 99, 200)):
        steps = Steps(KVzap(threshold=-1e9), rule=RULE, counts=above(-1e9), fitted=FITTED).run(*chunks)
        pages = steps.cache.compressed[0].body.youngest
        there = pages.columns >= 0
        known.append(dict(zip(pages.columns[there].tolist(), pages.importance[there].tolist(), strict=True)))
    assert known[0].keys() == known[1].keys()
    assert np.allclose(list(known[0].values()), [known[1][c] for c in known[0]], atol=1e-5)


def test_protected_tokens_stay_and_a_schedule_is_kept():
    for more in ({"protect": 60}, {"schedule": "prompt"}, {"schedule": 30}, {"merge": True}):
        method = KVzap(**more)
        Steps(method, pads=9, rule=RULE, counts=above(1.0), fitted=FITTED).run(250, 60, *[1] * 40)


def test_weights_are_the_least_squares_solution():
    """Of the rows, and of RIDGE times the mean square of a channel as further rows; the bias is free."""
    rows, wanted = torch.randn(200, 7) @ torch.randn(7, 7) + 3, torch.randn(200, 2)
    weight, bias = ridge(rows, wanted)
    x, y = (a.double().numpy() for a in (rows, wanted))
    penalty = np.sqrt(RIDGE * 200 * (x - x.mean(0)).var(0).mean())
    longer = np.block([[x, np.ones((200, 1))], [penalty * np.eye(7), np.zeros((7, 1))]])
    found = np.linalg.lstsq(longer, np.vstack([y, np.zeros((7, 2))]), rcond=None)[0]
    np.testing.assert_allclose(weight, found[:7].T, atol=1e-5)
    np.testing.assert_allclose(bias, found[7], atol=1e-4)


def test_agreement_is_the_rank_correlation():
    a, b = torch.randn(300, 2), torch.randn(300, 2)
    b = a + b
    want = np.mean([scipy.stats.spearmanr(a[:, n], b[:, n]).statistic for n in range(2)])
    assert agreement(a, b) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_a_fit_finds_the_map_and_one_threshold_for_all_heads(ratio):
    needed, maps = {}, {}
    for i in (0, 3):
        hidden, maps[i] = torch.randn(500, 6), torch.randn(2, 6)
        empty = torch.zeros(500, 2, 4)
        needed[i] = Needed(hidden, empty, empty, empty, (hidden @ maps[i].T - 4 * (i + 1)).exp())
    found, record = KVzap(ratio=ratio).finish({0: {}, 3: {}}, {}, probe_of(needed=needed))
    assert {float(own["least"]) for own in found.values()} == {record["least"]} or ratio == 1.0
    guesses = [needed[i].hidden @ found[i]["weight"].T + found[i]["bias"] for i in found]
    share = torch.cat([g.flatten() for g in guesses]).ge(found[0]["least"]).float().mean()
    assert float(share) == pytest.approx(ratio, abs=0.002)
    for i, own in found.items():
        torch.testing.assert_close(own["weight"], maps[i], atol=0.05, rtol=0.05)
    assert min(record["agreement"]) > 0.99


def test_a_fit_learns_what_is_needed_and_a_model_answers():
    artifact = fitted_to_reference(KVzap(ratio=0.3))
    assert np.mean(artifact.provenance["agreement"]) > 0.4
    check_generate(artifact, 0.75)


def test_settings():
    refused(KVzap, {"ratio": 0.0}, {"most": 64}, {"floor": 0.2}, {"visual_ratio": 0.5}, {"schedule": 0})
    refused(KVzap, {"threshold": float("nan")}, {"threshold": float("inf")})
