import dataclasses
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape, Probe
from kvshrink.methods.lowrank._ranks import in_proportion
from kvshrink.methods.lowrank.palu import Palu

SHAPE = LayerShape(4, 8, torch.float32)
LLAMA31 = LayerShape(8, 128, torch.bfloat16)


class Told(Probe):
    """Fisher information as given."""

    def __init__(self, fisher: dict[int, tuple[float, float]]) -> None:
        self.given = fisher

    def kl(self, codecs):
        raise AssertionError("Palu asks for no KL")

    def parts(self, codecs, turn):
        raise AssertionError("Palu asks for no KL")

    def near(self, budget):
        raise AssertionError("Palu asks for no KL")

    def once(self, key, measure):
        raise AssertionError("Palu asks for no KL")

    @property
    def tokens(self):
        raise AssertionError("nor are tokens judged")

    def fisher(self):
        return self.given


def finished(method: Palu, stats, fisher=None):
    """(tensors of the layers, record) of layers that all have these stats."""
    layers = {i: method.fit_layer(stats) for i in fisher or {0: None}}
    return method.finish(layers, dict.fromkeys(layers, stats.shape), Told(fisher) if fisher else None)


# --- factors ---


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kv", [0, 1])
def test_it_is_the_whitened_weight_svd_of_each_group_of_heads(stats_of, kv, bits, hadamard):
    """The paper's algorithm on the layer input x: Cholesky of x^T x, SVD of L^T W, L^-T U_r S_r V_r^T."""
    x = torch.randn(320, 40, dtype=torch.float64) @ torch.randn(40, 40, dtype=torch.float64) + 2  # not centred
    weight = torch.randn(40, 32, dtype=torch.float64)
    rows = (x @ weight).float()
    method = Palu(keep=0.5, group_heads=2, ranks="uniform", bits=bits, hadamard=hadamard)
    tensors, _ = finished(method, stats_of(SHAPE, keys=rows, values=rows))
    codec = method.codecs(SHAPE, tensors[0])[kv]
    heads = rows.unflatten(1, (4, -1)).transpose(0, 1)[None]
    got = codec.expand(codec.project(heads), 4)[0].transpose(0, 1).flatten(1)
    factor = torch.linalg.cholesky(x.T @ x)
    for group in (slice(0, 16), slice(16, 32)):
        u, s, vt = torch.linalg.svd(factor.T @ weight[:, group], full_matrices=False)
        want = x @ torch.linalg.solve_triangular(factor.T, u[:, :8], upper=True) @ torch.diag(s[:8]) @ vt[:8]
        torch.testing.assert_close(got[:, group].double(), want, rtol=1e-3, atol=1e-3)


def test_the_latent_has_half_of_the_spectrum(stats_of):
    """A = L^-T U S^1/2: the latent's energies are the singular values of (X W) up to one factor, not their squares."""
    rows = torch.randn(320, 32) @ torch.randn(32, 32)
    method = Palu(keep=1.0, ranks="uniform")
    codec = method.codecs(SHAPE, finished(method, stats_of(SHAPE, keys=rows))[0][0])[0]
    latent = codec.project(rows.unflatten(1, (4, -1)).transpose(0, 1)[None])[0, 0]
    ratio = latent.square().sum(0).double() / torch.linalg.svdvals(rows.double())
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def test_hadamard_changes_no_score_and_spreads_what_is_stored(stats_of):
    rows = torch.randn(320, 32) * torch.logspace(1, -2, 32)  # a few channels have it all
    stats = stats_of(SHAPE, keys=rows)
    queries, heads = torch.randn(4, 5, 8), rows.unflatten(1, (4, -1)).transpose(0, 1)[None]
    scores, errors = {}, {}
    for hadamard in (False, True):
        method = Palu(keep=0.5, bits=2, ranks="uniform", hadamard=hadamard)
        codec = method.codecs(SHAPE, finished(method, stats)[0][0])[0]
        exact = codec.expand(codec.project(heads), 4)[0]
        scores[hadamard] = queries @ exact.transpose(1, 2)
        errors[hadamard] = float((codec.decode(codec.encode(heads, None), 4)[0] - exact).square().sum())
    torch.testing.assert_close(scores[True], scores[False], rtol=1e-4, atol=1e-3)
    assert errors[True] < errors[False]


@pytest.mark.parametrize("kv", ["key", "value"])
def test_recorded_error_is_the_error_of_the_rows(stats_of, kv):
    rows = torch.randn(320, 32) @ torch.randn(32, 32) + 1
    method = Palu(keep=0.25, group_heads=2, ranks="uniform")
    tensors, record = finished(method, stats_of(SHAPE, keys=rows, values=rows))
    codec = method.codecs(SHAPE, tensors[0])[("key", "value").index(kv)]
    heads = rows.unflatten(1, (4, -1)).transpose(0, 1)[None]
    lost = (codec.expand(codec.project(heads), 4) - heads).square().sum()
    want = float(lost / (rows - rows.mean(0)).square().sum())
    assert record["layers"][0][f"{kv}_error"] == pytest.approx(want, rel=1e-3)


# --- ranks ---


def test_shares_are_proportional_where_no_bound_is_met():
    assert in_proportion(60, [1.0, 2.0, 3.0], 40) == [10, 20, 30]
    assert in_proportion(60, [0.0, 0.0, 0.0], 40) == [20, 20, 20]
    assert in_proportion(61, [1.0, 1.0, 1e9], 59) == [1, 1, 59]
    assert in_proportion(62, [1.0, 2.0, 1e9], 56) == [2, 4, 56], "what the largest cannot take, by the same proportion"


def test_shares_sum_to_the_budget_and_keep_their_bounds_and_order():
    draw = random.Random(0)
    for _ in range(300):
        n, most = draw.randrange(1, 9), draw.randrange(1, 50)
        weights = [draw.choice([0.0, 1e-30, draw.random(), 10 ** draw.uniform(-12, 12)]) for _ in range(n)]
        total = draw.randrange(n, n * most + 1)
        units = in_proportion(total, weights, most)
        assert sum(units) == total
        assert 1 <= min(units) <= max(units) <= most
        # fractions may be rounded up for one and down for the other, never more
        pairs = list(zip(units, weights, strict=True))
        assert all(a + 1 >= b for a, x in pairs for b, y in pairs if x >= y)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("keep", [0.1, 0.37, 0.5, 0.9, 1.0])
def test_all_layers_together_take_the_bytes_that_were_promised(stats_of, keep, bits):
    fisher = {0: (1.0, 5.0), 1: (0.3, 90.0), 2: (2.0, 4.0)}
    method = Palu(keep=keep, group_heads=2, bits=bits)
    tensors, record = finished(method, stats_of(SHAPE), fisher)
    held = sum(method.bits_per_token(SHAPE, t) for t in tensors.values())
    assert held == pytest.approx(3 * method.bits_per_token(SHAPE, {}), abs=1e-9)
    ranks = record["ranks"]
    assert ranks["1 value"] == max(ranks.values())
    assert ranks["1 key"] == min(ranks.values())
    for i, layer in tensors.items():
        assert [layer[f"{s}_basis"].shape[1] for s in ("key", "value")] == [ranks[f"{i} {s}"] for s in ("key", "value")]


def test_ranks_of_a_wide_group_are_multiples_of_32_and_of_a_narrow_one_of_less():
    method = Palu(keep=0.3)
    assert method.budget_values(LLAMA31, 4096) == [r / 512 for r in range(32, 513, 32)]
    assert method.rank(LLAMA31) == 128  # .3 * 512 is 153.6
    assert method.rank(LayerShape(2, 64, torch.float32)) == 38  # .3 * 128 is 38.4, in steps of 2
    assert method.bits_per_token(LLAMA31, {}) == 2 * 2 * 128 * 16
    assert Palu(keep=0.5, bits=3).bits_per_token(LLAMA31, {}) == 2 * 2 * (256 * 3 + 32)


@pytest.mark.parametrize(("heads", "group"), [(8, 4), (6, 3), (2, 2), (1, 1), (5, 1)])
def test_groups_divide_the_heads(heads, group, stats_of):
    shape = LayerShape(heads, 8, torch.float32)
    basis = Palu(ranks="uniform").fit_layer(stats_of(shape))["key_basis"]
    assert basis.shape == (heads // group, 8 * group, 8 * group)


def test_fitted_to_a_model_it_holds_its_budget():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = torch.randint(0, 61, (6, 256))
    artifact = kvshrink.fit(model, Palu(keep=0.4, bits=4), rows, progress=False)
    assert (
        set(artifact.provenance["fisher"])
        == set(artifact.provenance["ranks"])
        == {f"{i} {s}" for i in range(3) for s in ("key", "value")}
    )
    assert 0 < artifact.provenance["layers"]["0"]["key_error"] < 1
    assert len(set(artifact.provenance["ranks"].values())) > 1
    cache = kvshrink.make_cache(model, artifact)
    with torch.no_grad():
        out = model(input_ids=rows[:1], past_key_values=cache)
    shape = cache.layers[0].shape
    assert sum(x.held().total for x in cache.layers) == 3 * artifact.method.layer_bytes(shape, {}, 256)
    assert out.logits.isfinite().all()
    kvshrink.detach(model)


def test_a_folder_needs_uniform_ranks(tmp_path):
    """Fisher information needs gradients of the whole model."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    rows = torch.randint(0, 61, (2, 64))
    with pytest.raises(SettingError, match="palu asks the whole model"):
        kvshrink.fit(tmp_path, Palu(), rows, progress=False)
    assert kvshrink.fit(tmp_path, Palu(ranks="uniform"), rows, progress=False).provenance["ranks"]["1 value"] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"keep": 1.1}, r"keep=1\.1 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"keep": "half"}, r"keep='half' is not possible\. Use a number\."),
        ({"bits": 5}, r"bits=5 is not possible\. Use None or one of \(8, 4, 3, 2\)\."),
        ({"group_heads": 0}, r"group_heads=0 is not possible\. Use a whole number, 1 or more\."),
        ({"ranks": "kl"}, r"ranks='kl' is not possible\. Use 'fisher' or 'uniform'\."),
        ({"hadamard": 1}, r"hadamard=1 is not possible\. Use True or False\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = Palu()
    for name, value in settings.items():  # the constructor's own types are checked in tests, so not through it
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{message}$"):
        method.check()


def test_a_keep_below_one_step_is_refused_with_the_least(stats_of):
    shape = LayerShape(4, 128, torch.float32)
    with pytest.raises(SettingError, match=r"^keep=0\.06 of 512 channels in steps of 32 .* at least 32/512\.$"):
        Palu(keep=0.06).bits_per_token(shape, {})
    assert dataclasses.replace(Palu(), keep=32 / 512).rank(shape) == 32
