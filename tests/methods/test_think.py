import dataclasses
import itertools
import re

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink.cache.rope import Rope
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank import _channels
from kvshrink.methods.lowrank.think import ThinK

LLAMA31 = LayerShape(8, 128, torch.bfloat16)
SMALL = LayerShape(2, 8, torch.float32)
# half a head apart, neighbours, and two channels of a head that are not rotated
ROPES = [
    pytest.param(Rope(torch.tensor([1.3, 0.4, 0.07, 0.01]), 1.0, False), id="halves"),
    pytest.param(Rope(torch.tensor([1.3, 0.4, 0.07, 0.01]), 1.0, True), id="interleaved"),
    pytest.param(Rope(torch.tensor([1.3, 0.4, 0.07]), 1.0, False), id="partial"),
]


@pytest.fixture(params=ROPES)
def rope(request):
    return request.param


def tied(energy: torch.Tensor, rope: Rope) -> torch.Tensor:
    """[h, d] with each pair at its mean."""
    first, second = rope.pairs()
    energy = energy.clone()
    energy[:, first] = energy[:, second] = (energy[:, first] + energy[:, second]) / 2
    return energy


@pytest.fixture
def stats(stats_of, rope):
    made = stats_of(SMALL)
    return dataclasses.replace(made, pairs=rope.pairs(), query_energy=tied(made.query_energy, rope))


# --- bytes ---


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"keep": 0.5}, 8 * 64 * 16 + 1024 * 16),
        ({"keep": 0.6}, 8 * 76 * 16 + 1024 * 16),  # 76.8 channels a head: pairs, rounded down
        ({"keep": 1.0}, 2 * 1024 * 16),
        # keys: a 32-bit scale pair per channel and 32 tokens; values: 4 pairs per token and head
        ({"keep": 0.5, "bits": 4}, 8 * 64 * 4 + 8 * 64 * 32 / 32 + 1024 * 4 + 32 * 32),
        ({"keep": 0.5, "bits": 2}, 8 * 64 * 2 + 8 * 64 * 32 / 32 + 1024 * 2 + 32 * 32),
    ],
)
def test_bits_by_hand(settings, bits):
    assert ThinK(**settings).bits_per_token(LLAMA31, {}) == bits


def test_a_pruned_channel_is_not_there(stats):
    """The page holds the channels kept and nothing of the others."""
    method = ThinK(keep=0.5)
    codec, _ = method.codecs(SMALL, method.fit_layer(stats))
    rows = torch.randn(3, 2, 64, 8)
    stored = codec.encode(rows, None)
    assert sum(t.nbytes for t in stored.values()) == rows.nbytes / 2
    gone = sorted(set(range(16)) - set(codec.kept.tolist()))
    changed = rows.transpose(1, 2).flatten(2)
    changed[..., gone] += 1
    again = codec.encode(changed.unflatten(2, (2, 8)).transpose(1, 2), None)
    assert all(torch.equal(again[k], t) for k, t in stored.items())


# --- what comes back ---


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_channels_come_back_exactly_and_the_others_as_the_fill(stats, fill, dtype):
    method, shape = ThinK(keep=0.5, fill=fill), dataclasses.replace(SMALL, dtype=dtype)
    fitted = method.fit_layer(stats)
    codec, values = method.codecs(shape, fitted)
    rows = torch.randn(2, 2, 96, 8).to(dtype)
    back = codec.decode(codec.encode(rows, None), 2)
    for head in range(2):
        kept = [c - head * 8 for c in fitted["key_kept"].tolist() if c // 8 == head]
        assert len(kept) == 4
        mean = stats.key.mean[head * 8 :].float()
        for c in range(8):
            want = rows[:, head, :, c].float() if c in kept else (mean[c] if fill == "mean" else torch.tensor(0.0))
            assert torch.equal(back[:, head, :, c], want.expand(2, 96))
    assert torch.equal(values.decode(values.encode(rows, None), 2), rows.float())


def test_pruning_commutes_with_rope(stats, rope):
    """The pair rule: prune and rotate, or rotate and prune, give the same key."""
    method = ThinK(keep=0.5, fill="zero")
    codec, _ = method.codecs(SMALL, method.fit_layer(stats))
    rows, positions = torch.randn(1, 2, 64, 8), torch.arange(100, 164)[None]

    def pruned(x):
        return codec.decode(codec.encode(x, None), 2)

    torch.testing.assert_close(rope.apply(pruned(rows), positions), pruned(rope.apply(rows, positions)))
    assert (pruned(rows) == 0).sum() == rows.numel() / 2


def test_only_a_mean_needs_keys_before_rope(stats):
    sites = {
        fill: ThinK(fill=fill).codecs(SMALL, ThinK(fill=fill).fit_layer(stats))[0].site for fill in ("mean", "zero")
    }
    assert sites == {"mean": "k_pre", "zero": "k_post"}


# --- which channels ---


def test_the_choice_is_the_papers(stats_of, rope):
    """Golden source: |q_c| |k_c| of rotated queries and keys (the paper's score), summed over a RoPE pair's squares."""
    scale = torch.rand(2, 2, 1, 8) * 2 + 0.1
    queries, keys = torch.randn(2, 2, 6000, 8) * scale
    positions = torch.randint(0, 5000, (1, 6000))
    turned_q, turned_k = (rope.apply(x[None], positions)[0] for x in (queries, keys))
    score = (turned_q.norm(dim=1) * turned_k.norm(dim=1)).square()
    stats = dataclasses.replace(
        stats_of(SMALL, keys=keys.transpose(0, 1).flatten(1)),
        query_energy=tied(queries.square().mean(1).double(), rope),
        pairs=rope.pairs(),
    )
    partner = {int(a): int(b) for a, b in zip(*rope.pairs(), strict=True)}
    groups = [(a, b) for a, b in partner.items()] + [(c,) for c in range(2 * len(partner), 8)]
    for keep in (0.25, 0.5, 0.75):
        kept = ThinK(keep=keep, fill="zero").fit_layer(stats)["key_kept"].tolist()
        for head in range(2):
            mine = {c - 8 * head for c in kept if c // 8 == head}
            assert len(mine) == 8 * keep
            assert all(set(g) <= mine or not set(g) & mine for g in groups), "a pair was split"
            worst_kept = min(score[head, list(g)].mean() for g in groups if set(g) <= mine)
            best_lost = max(score[head, list(g)].mean() for g in groups if not set(g) & mine)
            if all(len(g) == 2 for g in groups):
                assert worst_kept > 0.93 * best_lost


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_worth_is_the_error_that_is_measured(stats_of, fill):
    """q and k of independent channels: the mean squared error of q . k without some channels, from samples."""
    rows = torch.randn(40_000, 16) * torch.rand(16) + torch.rand(16) * 2
    queries = torch.randn(40_000, 16) * torch.rand(16)
    energy = queries.square().mean(0).view(2, 8).double()
    stats = dataclasses.replace(stats_of(SMALL, keys=rows), query_energy=energy, pairs=None)
    importance = _channels.importance(stats, fill)
    lost = rows - (rows.mean(0) if fill == "mean" else 0)
    for gone in ([3], [0, 9, 12], list(range(16))):
        if fill == "zero" and len(gone) > 1:
            continue  # means of several channels add up, which a sum of their worths leaves out
        measured = (queries[:, gone] * lost[:, gone]).sum(1).square().mean()
        torch.testing.assert_close(importance[gone].sum(), measured.double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("scores", ["calibrated", "magnitude"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_no_other_set_of_pairs_is_worth_more(stats_of, keep, scores):
    rope = Rope(torch.tensor([1.3, 0.4, 0.07, 0.01]), 1.0, False)
    made = stats_of(SMALL)
    stats = dataclasses.replace(made, pairs=rope.pairs(), query_energy=tied(made.query_energy, rope))
    kept = ThinK(keep=keep, scores=scores).fit_layer(stats)["key_kept"].tolist()
    variance = stats.key.covariance.diagonal().view(2, 8)
    importance = variance * (stats.query_energy if scores == "calibrated" else 1)
    for head in range(2):
        pairs = [float(importance[head, p] + importance[head, p + 4]) for p in range(4)]
        if scores == "calibrated":  # the query energy is the pair's, so it stands before the sum
            assert stats.query_energy[head, 0] == stats.query_energy[head, 4]
        best = max(itertools.combinations(range(4), int(4 * keep)), key=lambda c: sum(pairs[p] for p in c))
        assert {c - 8 * head for c in kept if c // 8 == head} == {*best, *(p + 4 for p in best)}


# --- in a model ---


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=61,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model, cache) -> torch.Tensor:
    ids = torch.randint(0, 61, (2, 150), generator=torch.Generator().manual_seed(1))
    model(ids[:, :140], past_key_values=cache)
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(140, 150)], 1)


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_all_channels_kept_is_the_full_cache(model, fill):
    artifact = kvshrink.fit(model, ThinK(keep=1.0, fill=fill), torch.randint(0, 61, (2, 128)), progress=False)
    got = logits(model, kvshrink.make_cache(model, artifact))
    torch.testing.assert_close(got, logits(model, DynamicCache(config=model.config)), atol=1e-5, rtol=1e-4)


def test_fit_keeps_whole_pairs_of_the_model(model):
    artifact = kvshrink.fit(model, ThinK(keep=0.5), torch.randint(0, 61, (2, 128)), progress=False)
    for fitted in artifact.layers.values():
        kept = fitted["key_kept"].tolist()
        assert len(kept) == 8
        assert {c // 8 * 8 + (c + 4) % 8 for c in kept} == set(kept), "half of a pair was left out"
    cache = kvshrink.make_cache(model, artifact)
    assert logits(model, cache).isfinite().all()
    held = cache.layers[0].held()
    assert held.payload == 2 * len(cache.layers[0].pages) * 32 * (8 + 16) * 4


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep=0.0 is not possible. Use a share of key channels above 0, up to 1."),
        ({"keep": 1.5}, "keep=1.5 is not possible. Use a share of key channels above 0, up to 1."),
        ({"keep": float("nan")}, "keep=nan is not possible. Use a share of key channels above 0, up to 1."),
        ({"keep": "half"}, "keep='half' is not possible. Use a number."),
        ({"bits": 1}, "bits=1 is not possible. Use None or one of (8, 4, 3, 2)."),
        ({"bits": 4.0}, "bits=4.0 is not possible. Use a whole number."),
        ({"fill": "median"}, "fill='median' is not possible. Use 'mean' or 'zero'."),
        ({"scores": "prompt"}, "scores='prompt' is not possible. Use 'calibrated' or 'magnitude'."),
        ({"window": 0}, "window=0 is not possible. Use at least 1 token."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = ThinK()
    for name, value in settings.items():  # the constructor's own types are checked in tests, so not through it
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        method.check()


def test_a_keep_without_a_pair_is_refused_and_names_one_that_is_enough():
    with pytest.raises(SettingError, match=r"^keep=0\.2 keeps no pair of 8 channels\. Use keep of at least 0\.25\.$"):
        ThinK(keep=0.2).bits_per_token(SMALL, {})
    assert ThinK(keep=0.25).bits_per_token(SMALL, {}) == (2 * 2 + 16) * 32


def test_the_dial_reaches_every_number_of_pairs():
    values = ThinK().budget_values(LLAMA31, 1000)
    sizes = [ThinK(keep=v).bits_per_token(LLAMA31, {}) for v in values]
    assert sizes == [(8 * r + 1024) * 16 for r in range(2, 129, 2)]
