"""kernels/attention: folded blocks and merged segments must be softmax attention over their union, in float64."""

import pytest
import torch

from kvshrink.kernels.attention import finish, fold, merge, start

B, H, X, T, D = 2, 4, 6, 37, 5
SPLITS = [[37], [1] * 37, [20, 17], [5, 30, 2]]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def softmax_attention(query, keys, values, visible=None, softcap=None):
    """The definition: (output, log-sum-exp). Keys and values may be shared by groups of heads."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    values = values.repeat_interleave(keys.shape[1] // values.shape[1], 1)
    scores = query @ keys.transpose(-1, -2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1) @ values, scores.logsumexp(-1, keepdim=True)


def folded(query, keys, values, split, visible=None, softcap=None):
    state = start(query, values.shape[-1])
    at = 0
    for size in split:
        part = slice(at, at + size)
        seen = None if visible is None else visible[..., part]
        state = fold(state, query, keys[:, :, part], values[:, :, part], seen, softcap)
        at += size
    return finish(state)


def close(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"{len(s)} blocks")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("key_groups", [1, 2, 4])
def test_blocks_in_any_split_are_softmax_attention(split, softcap, groups, key_groups):
    query, keys, values = double(B, H, X, D), double(B, key_groups, T, D), double(B, groups, T, 3)
    close(folded(query, keys, values, split, softcap=softcap), softmax_attention(query, keys, values, softcap=softcap))


@pytest.mark.parametrize("shape", [(B, H, X, T), (B, 1, X, T), (B, H, 1, T), (B, 1, 1, T)], ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"{len(s)} blocks")
def test_masks(shape, split):
    query, keys, values = double(B, H, X, D), double(B, H, T, D), double(B, 2, T, 3)
    visible = torch.rand(shape) > 0.6
    visible[..., -1] = True
    close(folded(query, keys, values, split, visible), softmax_attention(query, keys, values, visible))


def test_a_mask_of_one_row_serves_the_whole_batch():
    """What a causal mask without padding is."""
    query, keys, values = double(B, H, X, D), double(B, H, T, D), double(B, 2, T, 3)
    visible = (torch.arange(T) <= torch.arange(T - X, T)[:, None])[None, None]
    close(folded(query, keys, values, [20, 17], visible), softmax_attention(query, keys, values, visible))


def test_a_row_that_sees_nothing_gives_zero_and_no_weight():
    query, keys, values = double(B, H, X, D), double(B, H, T, D), double(B, H, T, 3)
    visible = torch.ones(B, 1, X, T, dtype=torch.bool)
    visible[0, :, 2] = False
    out, lse = folded(query, keys, values, [20, 17], visible)
    assert not out[0, :, 2].any()
    assert bool((lse[0, :, 2] == -torch.inf).all())
    assert out.isfinite().all()


def test_a_block_that_shows_nothing_changes_nothing():
    query, keys, values = double(B, H, X, D), double(B, H, T, D), double(B, H, T, 3)
    visible = torch.ones(B, 1, X, T, dtype=torch.bool)
    visible[..., :20] = False  # the very first block is hidden as a whole
    visible[..., 30:] = False
    alone = softmax_attention(query, keys[:, :, 20:30], values[:, :, 20:30])
    close(folded(query, keys, values, [20, 10, 7], visible), alone)


def test_large_scores_do_not_overflow():
    query, keys, values = double(B, H, X, D).float() * 300, double(B, H, T, D).float(), double(B, 1, T, 3).float()
    out, lse = folded(query, keys, values, [1] * T)
    want, want_lse = softmax_attention(query.double(), keys.double(), values.double())
    assert lse.max() > 500  # exp of it is beyond float32
    torch.testing.assert_close(out, want.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=0)


def test_the_query_may_be_used_again():
    query, keys, values = double(B, H, X, D), double(B, H, T, D), double(B, H, T, 3)
    before = [t.clone() for t in (query, keys, values)]
    first = folded(query, keys, values, [T], softcap=2.0)
    close(folded(query, keys, values, [T], softcap=2.0), first)
    assert all(torch.equal(a, b) for a, b in zip((query, keys, values), before, strict=True))


@pytest.mark.parametrize("cuts", [[37], [3, 34], [1, 20, 16]], ids=lambda c: f"{len(c)} segments")
def test_merged_segments_are_attention_over_their_union(cuts):
    query, keys, values = double(B, H, X, D), double(B, H, T, D), double(B, H, T, D)
    visible = torch.rand(B, H, X, T) > 0.5
    visible[..., 0] = True
    visible[1, :, 3] = False  # a row that no segment shows anything to
    parts, at = [], 0
    for size in cuts:
        part = slice(at, at + size)
        parts.append(folded(query, keys[:, :, part], values[:, :, part], [size], visible[..., part]))
        at += size
    want = softmax_attention(query, keys, values, visible)[0].nan_to_num(0.0)
    torch.testing.assert_close(merge(parts), want, atol=1e-12, rtol=1e-12)
