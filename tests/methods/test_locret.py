import math

import numpy as np
import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from kvshrink.methods._token_probe import Needed
from kvshrink.methods.evict import locret
from kvshrink.methods.evict.kvzap import agreement
from kvshrink.methods.evict.locret import Locret
from tests.methods.evicting import (
    MEMBERS,
    Rule,
    Seen,
    Steps,
    check_generate,
    fitted_to_reference,
    probe_of,
    refused,
)

INSIDE, ROW = 5, 2 * MEMBERS * 8 + 2 * 8 + 2 * 8


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "first": (INSIDE, ROW),
        "first_bias": (INSIDE,),
        "second": (2, INSIDE),
        "second_bias": (2,),
        "mean": (ROW,),
    }
    found = {name: torch.randn(size, generator=draw) for name, size in shapes.items()}
    return found | {"spread": torch.rand(ROW, generator=draw) + 0.5}


FITTED = weights()


def scored(seen: Seen) -> np.ndarray:
    """W2 gelu(W1 [q; k; v]) of each new token by itself, rows before RoPE, queries times attention's scale."""
    own = {name: t.double().numpy() for name, t in FITTED.items()}
    found = np.zeros((2, len(seen.real)))
    for x, c in enumerate(seen.own):
        row = np.concatenate(
            [seen.queries[:, x].ravel() * 8**-0.5, seen.plain[:, c].ravel(), seen.values[:, c].ravel()]
        )
        inside = own["first"] @ ((row - own["mean"]) / own["spread"]) + own["first_bias"]
        inside = [a * (1 + math.erf(a / 2**0.5)) / 2 for a in inside]
        found[:, c] = own["second"] @ inside + own["second_bias"]
    return found


RULE = Rule(scored, range, keeps="own")


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("pads", [0, 45])
def test_tokens_that_the_network_scores_highest_stay(pads, rope):
    """A score is known when the token comes: over chunks and single tokens nothing later changes it."""
    Steps(Locret(ratio=0.3, width=INSIDE), pads=pads, rule=RULE, fitted=FITTED, turned=rope).run(300, 70, *[1] * 40)


@pytest.mark.parametrize("settings", [{"floor": 0.2}, {"protect": 60}, {"schedule": "prompt"}, {"most": 64}], ids=str)
def test_settings_of_all_methods(settings):
    Steps(Locret(ratio=0.25, **settings), pads=9, rule=RULE, fitted=FITTED, turned=True).run(250, 60, *[1] * 40)


def test_every_query_is_asked_also_of_a_single_token():
    steps = Steps(Locret(), rule=RULE, fitted=FITTED)
    assert steps.cache.compressed[0].probes(1).tolist() == [0]
    assert steps.cache.compressed[0].probes(30).tolist() == list(range(30))


def some_needed(count: int = 600) -> Needed:
    """Tokens whose score depends on key and value as a network of two layers can say, neighbours unlike."""
    q, k, v = torch.randn(count, 4, 8), torch.randn(count, 2, 8), torch.randn(count, 2, 8)
    wanted = (k[..., 0] * 2).tanh() + v[..., 1] - 4
    return Needed(torch.zeros(count, 3), q, k, v, wanted.exp())


def test_training_lowers_the_loss_and_finds_what_is_needed():
    needed, known, lost = some_needed(), [], []
    rows = torch.cat([x.flatten(1) for x in (needed.queries, needed.keys, needed.values)], 1)
    for steps in (1, 400):
        fitted = locret.trained(needed, 32, steps)
        guess = locret.network(fitted, rows)
        known.append(agreement(guess, needed.scores))
        lost.append(float(smooth_l1_loss(guess, needed.scores.log())))
    assert lost[1] < 0.5 * lost[0]
    assert known[1] > 0.7 > known[0]
    again = locret.trained(needed, 32, 400)
    assert all(torch.equal(t, again[name]) for name, t in fitted.items()), "the same on every run"


def test_channels_are_scaled_by_their_own_mean_and_spread():
    needed = some_needed(300)
    fitted = locret.trained(needed, 4, 1)
    rows = torch.cat([x.flatten(1) for x in (needed.queries, needed.keys, needed.values)], 1)
    scaled = (rows - fitted["mean"]) / fitted["spread"]
    assert np.allclose(scaled.mean(0), 0, atol=1e-5)
    assert np.allclose(scaled.std(0), 1, atol=1e-4)


def test_a_fit_trains_a_network_for_each_layer():
    found, record = Locret(width=16, steps=200).finish(
        {2: {}, 5: {}}, {}, probe_of(needed={2: some_needed(), 5: some_needed()})
    )
    assert {i: tuple(own["first"].shape) for i, own in found.items()} == {2: (16, 64), 5: (16, 64)}
    assert min(record["agreement"]) > 0.4


def test_a_fit_learns_and_a_model_answers():
    artifact = fitted_to_reference(Locret(ratio=0.28, width=32, steps=60))
    assert np.mean(artifact.provenance["agreement"]) > 0.4
    check_generate(artifact, 0.6)


def test_settings():
    refused(Locret, {"width": 0}, {"steps": 0}, {"ratio": 0.0}, {"most": 3}, {"floor": -1.0}, {"bits": 6})
