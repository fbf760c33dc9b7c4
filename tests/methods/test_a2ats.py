"""A2ATS: centroids that make scores right, look-ups that are those scores, and the tokens that they choose."""

import dataclasses

import pytest
import torch

from kvshrink.cache.attend import attend, rebuild
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant import a2ats
from kvshrink.methods.quant.a2ats import A2ATS
from tests.cache.build import feed, make

SHAPE = LayerShape(2, 16, torch.float32)


@pytest.fixture
def stats(stats_of):
    """Keys of any direction, queries that ask for three channels of each head alone."""
    keys = torch.randn(2000, 32)
    found = stats_of(SHAPE, keys, torch.randn(2000, 32))
    queries = torch.randn(2000, 4, 16) * torch.tensor([5.0] * 3 + [0.1] * 13)
    return dataclasses.replace(found, sample=dataclasses.replace(found.sample, queries_pre_rope=queries))


def score_error(stats, fitted) -> float:
    """Mean squared error of scores, straight from queries and keys, relative to the scores."""
    keys, queries = stats.sample.keys_pre_rope.transpose(0, 1), stats.sample.queries_pre_rope[:300]
    wrong = size = 0.0
    for head in range(2):
        c = fitted["centroids"][head]
        z, zc = keys[head] @ fitted["factor"][head], c @ fitted["factor"][head]
        coded = c[torch.cdist(z, zc).argmin(1)]
        for member in (2 * head, 2 * head + 1):
            wrong += float((queries[:, member] @ (keys[head] - coded).T).square().sum())
            size += float((queries[:, member] @ keys[head].T).square().sum())
    return wrong / size


def test_centroids_found_in_the_queries_metric_make_better_scores(stats):
    fitted = A2ATS().fit_layer(stats)
    plain = torch.stack([a2ats.means(rows) for rows in stats.sample.keys_pre_rope.transpose(0, 1).contiguous()])
    same = {"factor": torch.eye(16).expand(2, 16, 16), "centroids": plain}
    assert score_error(stats, fitted) < 0.1 < score_error(stats, same)


def test_the_metric_is_what_scores_lose(stats):
    """|e L|^2 = E[(q . e)^2] for any error e."""
    factor, error = A2ATS().fit_layer(stats)["factor"], torch.randn(5, 16)
    queries = stats.sample.queries_pre_rope
    for head in range(2):
        own = queries[:, 2 * head : 2 * head + 2].flatten(0, 1)
        torch.testing.assert_close(
            (error @ factor[head]).square().sum(1), (own @ error.T).square().mean(0), rtol=1e-2, atol=1e-3
        )


def test_scores_are_products_with_the_nearest_centroids(stats):
    method = A2ATS()
    fitted = method.fit_layer(stats)
    key, _ = method.codecs(SHAPE, fitted)
    rows, query = torch.randn(3, 2, 64, 16), torch.randn(3, 2, 2, 16)
    stored = key.encode(rows, None)
    assert stored["index"].shape == (3, 2, 2, 32)
    assert stored["index"].dtype == torch.uint8
    wanted = torch.zeros(3, 64)
    for b in range(3):
        for t in range(64):
            for h in range(2):
                away = ((rows[b, h, t] - fitted["centroids"][h]) @ fitted["factor"][h]).norm(dim=1)
                wanted[b, t] += query[b, h].sum(0) @ fitted["centroids"][h, away.argmin()]
    torch.testing.assert_close(key.scores(query, stored), wanted, rtol=1e-3, atol=1e-3)


def test_a_step_reads_the_tokens_that_score_highest_and_no_others(stats):
    """Beside plain attention over rebuilt keys with everything else masked."""
    method = A2ATS(topk=20, sinks=0, window=32)
    cache = make(method, SHAPE, [method.fit_layer(stats)])
    k, v = torch.randn(2, 1, 2, 320, 16)
    feed(cache, [k], [v])
    keys, values = feed(cache, [k[:, :, :1]], [v[:, :, :1]])[0]
    handle, query = keys._kvshrink, torch.randn(1, 4, 1, 16)
    (tier,) = handle.tiers
    block = next(tier.blocks(10**6))
    scores = tier.codecs[0].scores(query.unflatten(1, (2, 2))[:, :, :, 0], block.part("k."))
    mask = torch.zeros(321, dtype=torch.bool)
    mask[handle.first :] = True
    mask[scores[0].topk(20).indices] = True
    all_keys, all_values = (x.repeat_interleave(2, 1) for x in rebuild(handle, keys, values))
    wanted = (query @ all_keys.transpose(2, 3) / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ all_values
    torch.testing.assert_close(attend(query, keys, values, None, 0.25, None, handle), wanted, rtol=1e-4, atol=1e-5)


def test_an_index_is_a_byte_a_key_and_head(stats):
    shape = LayerShape(8, 128, torch.float16)
    assert A2ATS(bits=4).bits_per_token(shape, {}) == 2 * 1024 * 5 + 8 * 8
    method = A2ATS(bits=None)
    fitted = method.fit_layer(stats)
    assert fitted["centroids"].shape == (2, 256, 16)
    assert method.bits_per_token(SHAPE, fitted) == 2 * 32 * 32 + 2 * 8


def test_centroids_are_the_means_of_clear_clusters():
    centres = torch.randn(4, 8) * 100
    rows = centres.repeat(50, 1) + torch.randn(200, 8) * 0.01
    found = a2ats.means(rows, 4)
    assert torch.cdist(centres, found).amin(1).max() < 0.02


@pytest.mark.parametrize("topk", [0, 0.0, 1.5, -3])
def test_reading_nothing_is_refused(topk):
    with pytest.raises(SettingError, match="topk"):
        A2ATS(topk=topk)
