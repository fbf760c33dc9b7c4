"""KNorm ranks by the key alone, so that what the settings of all methods do is tested here."""

import numpy as np
import pytest
import torch

from kvshrink.methods.evict.knorm import KNorm
from tests.cache.build import feed, make
from tests.methods.evicting import SHAPE, Rule, Steps, refused

SMALL = Rule(lambda seen: -np.linalg.norm(seen.keys, axis=-1), None, keeps="own")
MIXED = (300, 70, *[1] * 40)


@pytest.mark.parametrize("pads", [0, 45])
def test_tokens_with_the_smallest_keys_stay(pads):
    Steps(KNorm(ratio=0.3), pads=pads, rule=SMALL).run(*MIXED)


def test_importance_is_the_same_in_whatever_chunks_a_prompt_comes():
    """What comes later changes nothing, so that a prefix may be shared."""
    assert KNorm().scorer({}).causal
    k, v, known = torch.randn(1, 2, 400, 8), torch.randn(1, 2, 400, 8), []
    for chunks in ([400], [100, 1, 99, 200]):
        cache = make(KNorm(ratio=1.0), SHAPE, [{}])
        for own in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
            feed(cache, [own[0]], [own[1]])
        pages = cache.compressed[0].body.youngest
        there = pages.columns[0, 0] >= 0
        known.append(
            dict(zip(pages.columns[0, 0, there].tolist(), pages.importance[0, 0, there].tolist(), strict=True))
        )
    assert known[0] == known[1] == {c: -float(k[0, 0, c].norm()) for c in range(4, 352)}


def test_no_query_is_asked():
    assert Steps(KNorm(), rule=SMALL).cache.compressed[0].probes(500) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.1},
        {"ratio": 1.0},
        {"ratio": 0.5, "most": 100},
        {"ratio": 0.3, "floor": 0.0},
        {"ratio": 0.3, "floor": 0.5, "most": 70},
        {"ratio": 0.3, "protect": 70},
        {"ratio": 0.3, "protect": 3},
        {"ratio": 0.3, "floor": 0.2, "protect": 50},
        {"ratio": 0.3, "schedule": "prompt"},
        {"ratio": 0.3, "schedule": 1},
        {"ratio": 0.1, "schedule": 20},
        {"ratio": 0.3, "merge": True},
        {"ratio": 0.3, "merge": True, "floor": 0.1, "schedule": "prompt"},
        {"ratio": 0.2, "window": 70, "sinks": 0},
        {"ratio": 0.2, "sinks": 40},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()),
)
def test_settings_of_all_methods(settings):
    """By the brute force: a share in whole pages, no more than `most`, heads that compete, what always stays, when
    tokens go, and values that others joined."""
    steps = Steps(KNorm(**settings), pads=37, rule=SMALL).run(300, 70, *[1] * 70, 50, *[1] * 5)
    pages = steps.cache.compressed[0].body.youngest
    assert (pages.used[pages.table != 0] == 32).mean() > 0.5, "whole pages"


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("more", [{}, {"protect": 100}, {"most": 64}, {"schedule": "prompt"}, {"merge": True}], ids=str)
def test_held_bytes_are_those_promised(bits, more):
    method = KNorm(ratio=0.2, bits=bits, **more)
    steps = Steps(method, rule=SMALL)
    steps.step(700)
    assert steps.cache.compressed[0].held().total == method.layer_bytes(SHAPE, {}, 700, 2)


def test_heads_that_compete_hold_as_many_tokens_together():
    """One head's keys are half as large: with no floor it gets all that it wins, with one it leaves the other a
    part."""
    k, v = torch.randn(2, 2, 600, 8) * torch.tensor([0.5, 1.0])[:, None, None], torch.randn(2, 2, 600, 8)
    for floor, least in ((0.0, 0), (0.5, 80)):
        cache = make(KNorm(ratio=0.3, floor=floor), SHAPE, [{}])
        feed(cache, [k], [v])
        counts = cache.compressed[0].body.youngest.tokens
        assert (counts.sum(1) == 2 * 6 * 32).all(), "0.3 of the 17 pages that left"
        assert (counts[:, 0] > counts[:, 1]).all()
        assert (counts[:, 1] >= least).all()


def test_settings():
    refused(KNorm, {"ratio": 0}, {"floor": -0.1}, {"most": 31}, {"protect": 2**20 + 1}, {"schedule": 0})
    refused(KNorm, {"visual_ratio": 0.0}, {"sinks": -1}, {"bits": 3}, {"schedule": "pages"}, {"visual": "rtn"})
