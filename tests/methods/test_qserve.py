import pytest
import torch

from kvshrink.methods._quantiser import SideStats, Transform
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.qserve import STEPS, QServe, largest

SHAPE = LayerShape(2, 16, torch.float32)


@pytest.fixture
def stats(stats_of):
    """Keys with two channels that are large in every token, as after a key projection with a bias."""
    keys = torch.randn(320, 32)
    keys[:, [3, 20]] += 7  # from 8 times what varies on the fit takes it away
    return stats_of(SHAPE, keys)


def test_lambda_is_a_power_of_the_largest_magnitude_of_a_rope_pair(stats):
    most = largest(SideStats.of(stats, "key", "k_post"))
    rotated = stats.sample.keys_post_rope.abs()
    for head in range(2):
        for channel in range(8):
            pair = max(rotated[:, head, channel].max(), rotated[:, head, channel + 8].max())
            assert most[head, channel] == most[head, channel + 8] == pair


def test_alpha_is_the_best_of_all_steps_and_better_than_none(stats):
    method, side_stats = QServe(), SideStats.of(stats, "key", "k_post")
    key, _ = method.codecs(SHAPE, method.fit_layer(stats))
    errors = [
        side_stats.cost(key.packing, Transform.scaled(largest(side_stats).pow(i / STEPS))) for i in range(STEPS + 1)
    ]
    rows = side_stats.tokens(32)
    back = key.decode(key.encode(rows, None), 2)[0].transpose(0, 1)
    wrong = back - side_stats.rows[: len(back)]
    # the error of every query's scores, query by query
    queries = stats.sample.queries_post_rope.unflatten(1, (2, 2))
    scores = torch.einsum("qhmd,thd->qhmt", queries, wrong).square().sum()
    size = torch.einsum("qhmd,thd->qhmt", queries, side_stats.rows[: len(back)]).square().sum()
    assert float(scores / size) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.8 * errors[0]


def test_scores_are_what_they_were_without_rounding(stats):
    key, _ = QServe(bits=8).codecs(SHAPE, QServe(bits=8).fit_layer(stats))
    rows, query = stats.sample.keys_post_rope[:64].transpose(0, 1)[None], torch.randn(1, 2, 3, 16)
    exact = query @ rows.transpose(2, 3)
    torch.testing.assert_close(key.absorb(query) @ key.project(rows).transpose(2, 3), exact, rtol=1e-5, atol=1e-4)


def test_bits_of_a_head_of_128():
    assert QServe().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048 == 4.25
