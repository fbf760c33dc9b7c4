import math

import numpy as np
import pytest
import torch

from kvshrink.cache import attend
from kvshrink.errors import CacheError, SettingError
from kvshrink.methods.evict.adakv import AdaKV
from kvshrink.methods.evict.h2o import H2O
from kvshrink.methods.evict.snapkv import SnapKV
from tests.methods.evicting import MEMBERS, SHAPE, Steps

METHODS = [SnapKV(ratio=0.3), H2O(ratio=0.3), AdaKV(ratio=0.3)]


@pytest.mark.parametrize("pads", [0, 45])
def test_what_is_kept_is_what_a_brute_force_over_all_probabilities_keeps(pads):
    steps = Steps(SnapKV(ratio=0.3), pads=pads)
    steps.step(500)
    steps.check()
    assert all(len(columns) == 5 * 32 for row in steps.kept() for columns in row)
    assert all(c >= pads + 4 for columns in steps.kept()[0] for c in columns), "neither a pad nor a sink"


def test_chunks_and_single_tokens_keep_the_budget():
    steps = Steps(SnapKV(ratio=0.25, pool=3))
    for tokens in (200, 150, 1, 90, *[1] * 70):
        steps.step(tokens)
        steps.check()
        pages = steps.cache.compressed[0].body.youngest
        left = steps.left(steps.keys.shape[2]) // 32
        assert int(pages.tokens.max(initial=0)) <= math.ceil(left / 4) * 32


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_attention_is_that_over_the_kept_tokens(method, bits):
    """The fused kernel, the block loop and a softmax over just these columns agree."""
    method = type(method)(**method.settings() | {"bits": bits})
    steps = Steps(method, pads=20)
    for tokens in (400, 60, *[1] * 5):
        query, keys, values = steps.step(tokens)
    steps.step(40)
    query, keys, values = steps.step(1)
    snapshot, mask = keys._kvshrink, None
    if steps.pads:
        mask = torch.from_numpy(np.stack([steps.real(row) for row in range(2)]))[:, None, None]
    got = attend.attend(query, keys, values, mask, 8**-0.5, None, snapshot)
    for row in range(2):
        for head in range(2):
            columns = steps.kept()[row][head] if bits else steps.dense(row, head)
            columns = sorted({*columns, *steps.dense(row, head)} - ({*steps.heads[row][head].kept} - {*columns}))
            k, v = steps.keys[row, head, columns], steps.values[row, head, columns]
            for member in range(MEMBERS):
                q = query[row, head * MEMBERS + member, 0].double().numpy() * 8**-0.5
                weights = np.exp(k @ q - (k @ q).max())
                want = weights @ v / weights.sum()
                assert np.abs(got[row, head * MEMBERS + member, 0].numpy() - want).max() < (2e-5 if not bits else 0.1)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_held_bytes_fall_as_promised(method, bits):
    held = []
    for ratio in (0.1, 0.5, 1.0):
        own = type(method)(**method.settings() | {"ratio": ratio, "bits": bits})
        steps = Steps(own)
        steps.step(1000)
        layer = steps.cache.compressed[0]
        held.append(layer.held().total)
        promised = own.layer_bytes(SHAPE, {}, 1000, 2)
        assert held[-1] == promised or (isinstance(own, AdaKV) and abs(held[-1] - promised) <= layer.held().index)
        assert layer.held().payload + layer.held().metadata == 2 * own.body_bytes(SHAPE, {}, 30)
    assert held[0] < 0.45 * held[1] < 0.35 * held[2]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_stored_token_moves_bit_for_bit(method):
    """What a kept token decodes to never changes while others come and go around it."""
    steps, seen = Steps(type(method)(**method.settings() | {"bits": 4})), {}
    for tokens in (300, *[33] * 6):
        steps.step(tokens)
        layer = steps.cache.compressed[0]
        keys = layer.codecs[0].decode(layer.body.youngest.records().under("k."), 2)
        for row, heads in enumerate(steps.kept()):
            for head, columns in enumerate(heads):
                slots = np.nonzero(layer.body.youngest.slots[row, head].numpy() >= 0)[0]
                for slot, column in zip(slots, columns, strict=True):
                    key = (row, head, column)
                    assert torch.equal(seen.setdefault(key, keys[row, head, slot].clone()), keys[row, head, slot])


def test_a_crop_beyond_the_window_is_refused():
    steps = Steps(SnapKV())
    steps.step(200)
    steps.cache.crop(-3)
    with pytest.raises(CacheError, match="cannot crop 100 tokens"):
        steps.cache.crop(-100)


def test_settings():
    for wrong in ({"pool": 4}, {"pool": 0}, {"observed": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"bits": 3}):
        with pytest.raises(SettingError):
            SnapKV(**wrong)
