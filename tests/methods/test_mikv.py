"""MiKV: exact tokens stay exact, the others are few bits of balanced keys, and the balancer itself changes nothing."""

import dataclasses

import pytest
import torch

from kvshrink import CSKV
from kvshrink.errors import SettingError
from kvshrink.kernels.pack import unpack
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing import Raw
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.mikv import MiKV

SHAPE = LayerShape(2, 20, torch.float32)


def fitted(stats_of) -> dict:
    return MiKV().fit_layer(stats_of(SHAPE))


def test_the_balancer_is_the_root_of_largest_query_over_largest_key(stats_of):
    stats = stats_of(SHAPE)
    balancer = MiKV().fit_layer(stats)
    assert set(balancer) == {"key_balancer"}
    for head in range(2):
        for c in range(20):
            largest = max(float(stats.sample.queries_post_rope[:, 2 * head + m, c].abs().max()) for m in range(2))
            want = (largest / float(stats.sample.keys_post_rope[:, head, c].abs().max())) ** 0.5
            assert float(balancer["key_balancer"][head, c]) == pytest.approx(want, rel=1e-5)


def test_scores_are_what_they_were_where_nothing_is_rounded(stats_of):
    key, _ = MiKV().codecs(SHAPE, fitted(stats_of))
    assert isinstance(key, BasisCodec)
    assert key.site == "k_post"
    exact = dataclasses.replace(key, packing=Raw(2, 20, 32, torch.float32))
    rows, query = torch.randn(1, 2, 64, 20) * 5, torch.randn(1, 2, 7, 20)
    stored = exact.encode(rows, None)
    torch.testing.assert_close(exact.decode(stored, 2), rows, rtol=1e-5, atol=1e-5)
    scores = exact.absorb(query) @ exact.unpack(stored).transpose(2, 3)
    torch.testing.assert_close(scores, query @ rows.transpose(2, 3), rtol=1e-4, atol=1e-4)
    # what is stored has channels that count alike: the largest key is as large as the largest query
    latent, balancer = exact.unpack(stored), fitted(stats_of)["key_balancer"]
    torch.testing.assert_close(latent, rows * balancer[:, None])


@pytest.mark.parametrize("low", [2, 3, 4])
def test_important_tokens_are_exact_and_the_others_the_plain_formula(low, stats_of):
    learnt = fitted(stats_of)
    rows, importance = torch.randn(2, 2, 96, 20) * 3 + 1, torch.rand(2, 2, 96)
    for codec, b in zip(MiKV(low=low).codecs(SHAPE, learnt), (learnt["key_balancer"][:, None], 1.0), strict=True):
        stored = codec.encode(rows, None, importance)
        got = codec.decode(stored, 2)
        chosen = unpack(stored["mask"].transpose(1, 2), 1).bool().flatten(2)
        assert chosen.sum() == 2 * 2 * 3 * 8
        torch.testing.assert_close(got[chosen], rows[chosen], rtol=1e-5, atol=1e-5)
        balanced = rows * b
        least, most = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
        scale, least = ((most - least) / (2**low - 1)).half().float(), least.half().float()
        want = (((balanced - least) / scale).round().clamp(0, 2**low - 1) * scale + least) / b
        torch.testing.assert_close(got[~chosen], want[~chosen], rtol=1e-4, atol=1e-4)


def test_scores_of_keys_with_outlier_channels_lose_less_for_the_balancer(stats_of):
    """Queries of channels where keys are large are small, as in trained models."""
    size = torch.ones(20)
    size[3] = 40.0
    stats = stats_of(SHAPE, keys=torch.randn(300, 40) * size.repeat(2), pairs=None)
    sample = dataclasses.replace(
        stats.sample, queries_post_rope=torch.randn(300, 4, 20) / size, keys_post_rope=stats.sample.keys_pre_rope
    )
    stats, method = dataclasses.replace(stats, sample=sample), MiKV()
    learnt = method.fit_layer(stats)
    rows, query = (
        sample.keys_pre_rope[:64].transpose(0, 1)[None],
        sample.queries_post_rope[:, ::2].transpose(0, 1)[None],
    )
    errors = []
    for balancer in (torch.ones(2, 20), learnt["key_balancer"]):
        key, _ = method.codecs(SHAPE, {"key_balancer": balancer})
        wrong = query @ (key.decode(key.encode(rows, None), 2) - rows).transpose(2, 3)
        errors.append(float(wrong.square().mean()))
    assert errors[1] < errors[0] / 10


def test_latents_are_balanced_by_the_size_of_the_queries_that_meet_them(stats_of):
    """z up has scores z (up q): the root mean square of up q, for want of the maximum."""
    stats = stats_of(SHAPE)
    learnt = CSKV(keep=0.5, codec="mikv").fit_layer(stats)
    rows = (stats.sample.keys_pre_rope.flatten(1) - learnt["key_mean"][0]) @ learnt["key_up"][0].T
    metric = torch.diag(stats.query_energy.float().flatten())
    largest = (learnt["key_up"][0] @ metric @ learnt["key_up"][0].T).diagonal().sqrt()
    want = (largest / rows.abs().amax(0)).sqrt()
    torch.testing.assert_close(learnt["key_codec_balancer"][0], want, rtol=1e-3, atol=1e-5)


def test_a_channel_that_is_never_used_does_no_harm(stats_of):
    keys = torch.randn(300, 40)
    keys[:, 4], keys[:, 24] = 0.0, 0.0
    learnt = MiKV().fit_layer(stats_of(SHAPE, keys=keys, pairs=None))
    assert learnt["key_balancer"].isfinite().all()
    key, _ = MiKV().codecs(SHAPE, learnt)
    rows = torch.randn(1, 2, 32, 20)
    assert key.decode(key.encode(rows, None), 2).isfinite().all()


def test_bits_by_hand():
    """A quarter of the tokens at 16 bits; the others 2 bits and 32 of scale and minimum; a bit a token and head."""
    shape = LayerShape(8, 128, torch.float16)
    assert MiKV().bits_per_token(shape, {}) == 2 * 8 * (128 * 16 / 4 + (128 * 2 + 32) * 3 / 4 + 1)
    assert MiKV(high=8).bits_per_token(shape, {}) == 2 * 8 * ((128 * 8 + 32) / 4 + (128 * 2 + 32) * 3 / 4 + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": 3}, r"high=3 is not possible\. Use one of None, 8, 4\."),
        ({"high": 4, "low": 4}, r"high=4 with low=4 is not possible\. Give important tokens more bits\."),
        ({"low": 1}, r"low=1 is not possible\. Use one of 4, 3, 2\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        MiKV(**settings)
