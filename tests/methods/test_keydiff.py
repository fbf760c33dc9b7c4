import numpy as np
import pytest
import torch

from kvshrink.methods.evict.keydiff import KeyDiff
from tests.cache.build import feed, make
from tests.methods.evicting import SHAPE, Rule, Seen, Steps, beside_pads, refused


def unlike(seen: Seen) -> np.ndarray:
    """Minus the cosine of each key and the mean of the unit keys of the exact tokens."""
    found = np.zeros(seen.keys.shape[:2])
    for head, keys in enumerate(seen.keys):
        units = [
            k / np.linalg.norm(k) for k, there in zip(keys[seen.exact], seen.real[seen.exact], strict=True) if there
        ]
        anchor = np.mean(units, 0)
        for c in range(seen.first, len(keys)):
            found[head, c] = -keys[c] @ anchor / np.linalg.norm(keys[c]) / np.linalg.norm(anchor)
    return found


RULE = Rule(unlike, None)


@pytest.mark.parametrize("pads", [0, 45])
def test_keys_least_like_the_mean_of_those_at_hand_stay(pads):
    """Judged once, when a token leaves the window: a chunk and single tokens have a mean of their own."""
    Steps(KeyDiff(ratio=0.3), pads=pads, rule=RULE).run(300, 70, *[1] * 70)


def test_many_that_are_alike_say_one_thing():
    """Of tokens that nearly all point one way, whatever their length, those that do not stay."""
    k, v = torch.randn(1, 2, 300, 8) * 0.2 + 3.0, torch.randn(1, 2, 300, 8)
    odd = torch.arange(10, 250, 8)
    k[:, :, odd] *= torch.tensor([1.0, -1.0] * 4)
    k *= torch.rand(300)[:, None] + 0.1
    cache = make(KeyDiff(ratio=0.1), SHAPE, [{}])
    feed(cache, [k], [v])
    for head in cache.compressed[0].body.youngest.columns[0].tolist():
        assert set(odd.tolist()) <= set(head)
        assert len(head) == 32


@pytest.mark.parametrize(
    "settings",
    [{"floor": 0.2}, {"protect": 60}, {"schedule": "prompt"}, {"schedule": 30}, {"merge": True}, {"most": 64}],
    ids=str,
)
def test_settings_of_all_methods(settings):
    Steps(KeyDiff(ratio=0.25, **settings), pads=11, rule=RULE).run(250, 60, *[1] * 70)


def test_a_pad_has_no_part_in_the_mean():
    np.testing.assert_allclose(*beside_pads(KeyDiff(ratio=1.0), RULE), rtol=1e-4)


def test_settings():
    refused(KeyDiff, {"ratio": 0.0}, {"ratio": 2}, {"bits": 5}, {"floor": 1.2}, {"schedule": "sometimes"})
