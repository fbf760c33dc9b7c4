import numpy as np
import pytest
import torch

from kvshrink.methods.evict.duo_attention import DuoAttention
from tests.methods.evicting import (
    NEWEST_FIRST,
    SHAPE,
    Steps,
    check_generate,
    fitted_to_reference,
    probe_of,
    reference,
    refused,
)

MIXED = (300, 70, *[1] * 70)


def classes(method: DuoAttention, whole: list[int]):
    """Tokens of each head: all, or what is recent beside the window, in whole pages."""
    recent = -(-(method.recent - method.window) // 32)
    return lambda row, candidates, pages: [(pages if full else min(pages, recent)) * 32 for full in whole]


@pytest.mark.parametrize("whole", [[1, 0], [0, 0], [1, 1]])
@pytest.mark.parametrize("pads", [0, 45])
def test_heads_that_look_far_keep_everything_and_others_the_first_and_recent_tokens(pads, whole):
    method = DuoAttention(sinks=8, recent=100)
    fitted = {"whole": torch.tensor(whole, dtype=torch.uint8)}
    steps = Steps(method, pads=pads, rule=NEWEST_FIRST, counts=classes(method, whole), fitted=fitted)
    for tokens in MIXED:
        steps.run(tokens)
        for row in range(2):
            text = np.nonzero(steps.real(row))[0].tolist()
            for head, full in enumerate(whole):
                seen = steps.dense(row, head)
                assert seen[:8] == text[:8]
                assert seen == text if full else seen[-100:] == text[-100:]
                assert full or len(seen) <= 8 + 100 + 2 * 32, "whatever the length"


def test_a_cache_that_streams_holds_as_many_bytes_at_any_length():
    method, held = DuoAttention(sinks=4, recent=64), []
    fitted = {"whole": torch.tensor([0, 0], dtype=torch.uint8)}
    for tokens in (320, 1280):
        steps = Steps(method, rule=NEWEST_FIRST, counts=classes(method, [0, 0]), fitted=fitted)
        steps.step(tokens)
        held.append(steps.cache.compressed[0].held().total)
    assert held[0] == held[1]


@pytest.mark.parametrize("whole", [[1, 0], [0, 0], [1, 1]])
def test_held_bytes_are_those_promised_of_a_layer_s_own_heads(whole):
    method, fitted = DuoAttention(sinks=4, recent=64), {"whole": torch.tensor(whole, dtype=torch.uint8)}
    steps = Steps(method, rule=NEWEST_FIRST, counts=classes(method, whole), fitted=fitted)
    steps.step(700)
    layer = steps.cache.compressed[0]
    kept = layer.body.ages[0].kept
    wide = 0 if kept.even else 9 * kept.counts.size * len(kept)  # where the pages of the longest head are
    assert layer.held().total == method.layer_bytes(SHAPE, fitted, 700, 2) + wide


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 1.0])
def test_the_share_of_heads_with_the_largest_gates_keeps_everything(ratio):
    gates = {3: torch.tensor([0.9, 0.1, 0.5, 0.2]), 7: torch.tensor([0.8, 0.85, 0.0, 0.45])}
    probe = probe_of(gates=gates)
    method = DuoAttention(ratio=ratio, recent=128, steps=9)
    found, record = method.finish({3: {}, 7: {}}, {}, probe)
    probe.tokens.gates.assert_called_once_with(64, 128, 9)
    count = max(1, round(8 * ratio))
    least = torch.cat(list(gates.values())).sort(descending=True).values[count - 1]
    assert {i: own["whole"].tolist() for i, own in found.items()} == {
        i: (g >= least).tolist() for i, g in gates.items()
    }
    assert record["gates"]["7"] == [0.8, 0.85, 0.0, 0.45]


def test_a_fit_says_which_heads_and_a_model_answers():
    artifact = fitted_to_reference(DuoAttention(sinks=4, recent=64, steps=2))
    whole = torch.cat([artifact.layers[i]["whole"] for i in range(4)])
    assert whole.tolist().count(1) == 4
    gates = torch.tensor([g for own in artifact.provenance["gates"].values() for g in own])
    assert gates[whole.bool()].min() >= gates[~whole.bool()].max()
    assert (gates < 1).all()
    check_generate(artifact, 0.75)
    assert reference()[0].config._attn_implementation == "kvshrink", "as it was before the fit, but attached"


def test_settings():
    refused(DuoAttention, {"recent": 31}, {"steps": 0}, {"most": 64}, {"floor": 0.2}, {"visual_ratio": 0.5})
    refused(DuoAttention, {"ratio": 0.0}, {"sinks": -1}, {"window": 300})
