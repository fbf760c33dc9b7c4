"""CSKV under a byte budget: ranks go where a loss costs the model, and all layers together hold the budget."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import CSKV, Artifact
from kvshrink.errors import SettingError
from kvshrink.kernels import native
from kvshrink.methods._stats import KVS, LayerShape, Parts, Probe

SHAPE = LayerShape(4, 20, torch.bfloat16)  # 80 channels each
LAYERS = range(3)


class Told(Probe):
    """A model to which errors of the values of layer 1 cost a thousand times those of all others."""

    def parts(self, codecs, turn):
        costs = {(i, kv): self.cost(i, kv, c) for i in codecs for kv, c in zip(KVS, codecs[i], strict=True)}
        whole = sum(costs.values())
        return Parts(whole, {at: cost / whole for at, cost in costs.items()})

    def cost(self, layer, kv, codec) -> float:
        lost = 1 - codec.up.shape[1] / 80  # a crude error that falls as the rank grows
        return (lost + 0.01) * (1.0 if (layer, kv) == (1, "value") else 0.001)

    def kl(self, codecs):
        raise AssertionError("single losses are not asked for")

    @property
    def tokens(self):
        raise AssertionError("nor are tokens judged")

    def fisher(self):
        raise AssertionError("nor is Fisher information")

    def near(self, budget):
        return budget

    def once(self, key, measure):
        return measure()


@pytest.fixture
def fitted(stats_of):
    def make(method: CSKV, probe: Told | None = None) -> tuple[dict, dict]:
        layers = {i: method.fit_layer(stats_of(SHAPE)) for i in LAYERS}
        return method.finish(layers, dict.fromkeys(LAYERS, SHAPE), probe or Told())

    return make


def held(method: CSKV, layers: dict) -> float:
    """Share of the full cache's bytes, over all layers."""
    pages = sum(c.page_bytes() for i in layers for c in method.codecs(SHAPE, layers[i]))
    return pages / (len(layers) * SHAPE.token_bytes * method.page)


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 4}, {"bits": 3, "group_heads": 2}, {"codec": "turboquant", "bits": 2}]
)
@pytest.mark.parametrize("budget", [0.03, 0.0625, 0.125])
def test_all_layers_together_hold_the_budget_and_nearly_all_of_it(fitted, settings, budget):
    method = CSKV(budget=budget, **settings)
    layers, record = fitted(method)
    assert held(method, layers) <= budget
    assert held(method, layers) > 0.97 * budget - 0.002
    assert record["unspent"] == pytest.approx(1 - held(method, layers) / budget, abs=0.01)
    assert method.bits_per_token(SHAPE, {}) == pytest.approx(budget * SHAPE.token_bytes * 8, rel=0.001)


def test_ranks_go_where_the_model_says(fitted):
    method = CSKV(budget=0.06)
    layers, record = fitted(method)
    ranks = {at: rank for at, (rank, _) in record["ranks and bits"].items()}
    assert ranks["1 value"] == 80
    assert sum(ranks.values()) - 80 < 160
    for i in LAYERS:
        for kv in KVS:
            assert layers[i][f"{kv}_up"].shape == (1, ranks[f"{i} {kv}"], 80)
            assert f"{kv}_variance" not in layers[i]


def test_what_is_kept_is_the_best_basis_of_its_rank(fitted, stats_of):
    """The directions of `keep` at the same rank, which are the optimum."""
    layers, record = fitted(CSKV(budget=0.125))
    rank, bits = record["ranks and bits"]["0 key"]
    same = CSKV(keep=rank / 80, bits=bits, codec="tcq").fit_layer(stats_of(SHAPE))["key_up"]
    ours = layers[0]["key_up"]
    torch.testing.assert_close(ours.transpose(1, 2) @ ours, same.transpose(1, 2) @ same, atol=1e-5, rtol=0)


def test_metrics_weigh_directions(fitted):
    plain, _ = fitted(CSKV(budget=0.1))
    weighed, _ = fitted(CSKV(budget=0.1, key_metric="query", value_metric="output"))
    assert "key_down" in weighed[0]
    assert "key_down" not in plain[0]
    assert weighed[0]["key_down"].shape[2] == weighed[0]["key_up"].shape[1]


def test_a_whole_cache_is_the_most_it_takes(fitted):
    method = CSKV(budget=1.0)
    layers, record = fitted(method)
    assert set(record["ranks and bits"].values()) == {(80, 4)}
    assert 0.25 < held(method, layers) < 0.26  # 4 bits of 16, and gains


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, r"budget=0\.0 is not possible\. Use a share of bytes above 0, up to 1\."),
        ({"budget": 1.2}, r"budget=1\.2 is not possible\..*"),
        ({"budget": 0.1, "key_share": 0.3}, r"budget=0\.1 with key_share=0\.3 .* The budget shares channels out\."),
        ({"budget": 0.1, "init": "asvd"}, r"budget=0\.1 with init='asvd' .* Use 'pca'.*"),
        ({"budget": 0.1, "steps": 10}, r"budget=0\.1 with loss='rows' .* Use 'kl'.*"),
        ({"budget": 0.1, "codec": "kvquant", "bits": 2}, r"budget=0\.1 with codec='kvquant' .* Use keep\."),
        ({"budget": 0.1, "codec": "zipcache"}, r"budget=0\.1 with codec='zipcache' .* Use keep\."),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        CSKV(**settings)


def test_a_budget_of_less_than_a_channel_is_refused(fitted):
    with pytest.raises(SettingError, match=r"^budget=0\.001 is less than a channel .* Use 0\.\d+\.$") as refused:
        fitted(CSKV(budget=0.001))
    least = float(str(refused.value).removesuffix(".").split()[-1])
    fitted(CSKV(budget=least))


def test_an_artifact_is_for_its_budget_alone():
    method = CSKV(budget=0.1)
    with pytest.raises(SettingError, match="Fit it again"):
        method.at_ratio(0.05)
    assert method.budget_setting == "budget"
    assert CSKV().budget_setting == "keep"
    assert dataclasses.replace(method, budget=None).probes is False


@pytest.mark.parametrize("settings", [{}, {"bits": 4, "steps": 3, "loss": "kl"}, {"codec": "turboquant", "bits": 2}])
def test_it_fits_a_model_holds_what_it_promises_and_comes_back_from_a_folder(settings, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=97, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(3, 97, (4, 300), generator=torch.Generator().manual_seed(1))
    method = CSKV(budget=0.15, **settings)
    artifact = kvshrink.fit(model, method, ids, progress=False)
    artifact.save_pretrained(tmp_path / "fitted")
    found = []
    for made in (artifact, Artifact.from_pretrained(tmp_path / "fitted")):
        cache = kvshrink.make_cache(model, made)
        model(ids[:1], past_key_values=cache)
        found.append(model(ids[:1, :1], past_key_values=cache).logits)
        held, shape = cache.report().held, cache.layers[0].shape
        assert 0 < held.payload + held.metadata <= 0.15 * 256 * len(cache.layers) * shape.token_bytes
        assert native.library() is None or str(cache.layers[0].body.view(None)[0].kernel) == "yes"
    assert torch.equal(*found)
    with pytest.raises(SettingError, match="Fit it again"):
        artifact.at(0.1)
