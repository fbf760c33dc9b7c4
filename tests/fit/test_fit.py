"""Fitting: the statistics, the bound, the layer-by-layer run, resume, and what bad input gets."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.attach.asking import key_value
from kvshrink.attach.families import attention_modules, layer_kinds
from kvshrink.cache.rope import Rope
from kvshrink.errors import DataError, SettingError
from kvshrink.fit import fit_all
from kvshrink.fit.collector import StatsCollector
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.source import InMemory
from kvshrink.fit.statistics import EnergyStream, MomentStream, output_gram, residual, residuals
from kvshrink.kernels.ceilings import Ceilings
from kvshrink.methods.lowrank.palu import Palu

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture
def rows():
    return torch.randint(0, 61, (6, 64), generator=torch.Generator().manual_seed(1))


def test_streamed_moments_are_the_moments_also_far_from_zero():
    x = torch.randn(300, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 100
    stream = MomentStream()
    for part in x.float().split(77):
        stream.add(part)
    moments = stream.moments()
    assert moments.count == 300
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.covariance, x.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_residual_is_the_error_measured_on_the_rows():
    x = torch.randn(200, 6) @ torch.randn(6, 6) + 3
    stream = MomentStream()
    stream.add(x)
    down, up, mean = torch.randn(2, 3, 2) / 2, torch.randn(2, 2, 3) / 2, torch.randn(2, 3)
    parts = [(x[:, 3 * g : 3 * g + 3] - mean[g]) @ down[g] @ up[g] + mean[g] for g in range(2)]
    wanted = (torch.cat(parts, 1) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert residual(stream.moments(), down, up, mean) == pytest.approx(float(wanted), rel=1e-5)
    parts = [(x[:, 3 * g : 3 * g + 3] - mean[g]) @ down[g][:, :1] @ up[g][:1] + mean[g] for g in range(2)]
    wanted = (torch.cat(parts, 1) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(residuals(stream.moments(), down, up, mean)[0]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("cls", [LlamaForCausalLM, Gemma3ForCausalLM], ids=lambda c: c.__name__)
def test_the_layer_by_layer_run_gives_what_the_model_computes(cls, rows):
    """Gemma3 mixes layer kinds, masks and rotary embeddings, and scales its embeddings."""
    torch.manual_seed(0)
    if cls is LlamaForCausalLM:
        net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        net = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=16, layer_types=kinds)).eval()
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, k: seen.__setitem__(m.layer_idx, k["hidden_states"]), with_kwargs=True)
        for m in attention_modules(net, layer_kinds(net))
    ]
    with torch.no_grad():
        net(input_ids=rows)
    wanted = dict(seen)
    for hook in hooks:
        hook.remove()
    runner = LayerRunner(InMemory(net), rows, batch=4)  # 4 and a ragged 2
    for i, layer in enumerate(net.get_decoder().layers):
        got = []
        runner.run(i, layer, lambda m, k, got=got: got.append(k["hidden_states"]), layer.self_attn)
        torch.testing.assert_close(torch.cat(got), wanted[i], rtol=1e-5, atol=1e-5)


def test_closed_form_is_a_bound_on_the_calibration_text(model, rows):
    """Also for the paper's training: nothing of this rank can be nearer."""
    methods = [CSKV(keep=k, init=i) for k in (0.5, 0.25) for i in ("pca", "asvd", "svd", "random")]
    methods += [CSKV(keep=k, init="asvd", steps=60, lr=1e-2) for k in (0.5, 0.25)]
    fitted = fit_all(model, methods, rows, progress=False)
    for keep in (0.5, 0.25):
        group = [a for a in fitted if a.method.keep == keep]
        best = group[0].provenance["layers"]
        for other in group[1:]:
            for i, record in other.provenance["layers"].items():
                for kv in ("key_error", "value_error"):
                    assert best[i][kv] <= record[kv] * (1 + 1e-6), (keep, other.method, i, kv)
        untrained, trained = group[1], group[-1]
        for i, record in trained.provenance["layers"].items():
            assert record["training"]["loss"][1] < record["training"]["loss"][0]
            assert record["key_error"] < untrained.provenance["layers"][i]["key_error"]


def test_quantisation_aware_training_lowers_the_error_it_trains(model, rows):
    plain, aware = fit_all(
        model, [CSKV(keep=0.5, bits=2), CSKV(keep=0.5, bits=2, steps=300, lr=3e-3, qat=True)], rows, progress=False
    )
    runner = LayerRunner(InMemory(model), rows, batch=6)
    taken = []
    layer = model.get_decoder().layers[0]
    runner.run(0, layer, lambda m, k: taken.extend(key_value(m, k)), layer.self_attn)
    error = {}
    for artifact in (plain, aware):
        shape = kvshrink.make_cache(model, artifact).layers[0].shape
        codecs = artifact.method.codecs(shape, artifact.layers[0])
        error[artifact] = sum(
            float((c.decode(c.encode(x, None), 2) - x).square().mean()) for c, x in zip(codecs, taken, strict=True)
        )
    assert error[aware] < 0.95 * error[plain]
    kvshrink.detach(model)


def test_auto_key_share_is_chosen_per_layer_and_kept(model, rows):
    artifact = kvshrink.fit(model, CSKV(keep=0.25, key_share="auto"), rows, progress=False)
    for i, record in artifact.provenance["layers"].items():
        best = min(record["share_errors"], key=record["share_errors"].get)
        assert float(best) == record["key_share"]
        ranks = artifact.method.ranks(kvshrink.make_cache(model, artifact).layers[0].shape, record["key_share"])
        assert (artifact.layers[int(i)]["key_up"].shape[1], artifact.layers[int(i)]["value_up"].shape[1]) == ranks
    kvshrink.detach(model)


def test_from_disk_layer_by_layer_is_the_same_fit(model, rows, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")  # several files
    method = CSKV(keep=0.5, bits=4)
    here = kvshrink.fit(model, method, rows, progress=False)
    there = kvshrink.fit(tmp_path / "model", method, rows, progress=False)
    assert there.model["identity"] == here.model["identity"]
    for i, layer in here.layers.items():
        for name, tensor in layer.items():
            torch.testing.assert_close(there.layers[i][name], tensor, rtol=1e-5, atol=1e-6)
    kvshrink.make_cache(model, there)
    kvshrink.detach(model)


@pytest.mark.parametrize(("flops", "heads"), [(1e30, 2), (1.0, 1)])
def test_group_heads_auto_is_a_number_in_the_artifact(model, rows, tmp_path, monkeypatch, flops, heads):
    """Whatever machine reads it; from a folder as from memory, and cut to fewer components."""
    with monkeypatch.context() as patch:
        patch.setattr("kvshrink.methods.lowrank.cskv.measure", lambda device, dtype: Ceilings(flops, 1e9))
        artifact = kvshrink.fit(model, CSKV(keep=0.5, group_heads="auto"), rows, progress=False)
        model.save_pretrained(tmp_path / "model")
        from_disk = kvshrink.fit(tmp_path / "model", CSKV(keep=0.5, group_heads="auto"), rows, progress=False)
    wanted = kvshrink.fit(model, CSKV(keep=0.5, group_heads=heads), rows, progress=False)
    assert artifact.method == from_disk.method == wanted.method
    assert artifact.layers[0]["key_up"].shape[0] == 2 // heads
    assert torch.equal(artifact.layers[2]["key_up"], wanted.layers[2]["key_up"])
    artifact.save_pretrained(tmp_path / "artifact")
    assert json.loads((tmp_path / "artifact" / "kvshrink.json").read_text())["settings"]["group_heads"] == heads
    kvshrink.make_cache(model, kvshrink.Artifact.from_pretrained(tmp_path / "artifact").at(0.25))
    kvshrink.detach(model)


class _Interrupt(Exception):
    pass


def test_an_interrupted_fit_resumes_and_gives_the_same(model, rows, tmp_path, monkeypatch):
    from kvshrink.fit import job as module

    method = CSKV(keep=0.5)
    whole = kvshrink.fit(model, method, rows, progress=False)
    run, calls = module._Job._layer, []

    def stops(self, index, layer, runner):
        if index == 2 and 2 not in calls:
            calls.append(index)
            raise _Interrupt
        calls.append(index)
        return run(self, index, layer, runner)

    monkeypatch.setattr(module._Job, "_layer", stops)
    with pytest.raises(_Interrupt):
        kvshrink.fit(model, method, rows, progress=False, checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "layer_000_0.safetensors").write_bytes(b"damaged")
    calls.append("again")
    resumed = kvshrink.fit(model, method, rows, progress=False, checkpoint=tmp_path)
    assert calls[calls.index("again") + 1 :] == [0, 2], "layer 1 is taken from the checkpoint, damaged layer 0 is not"
    for i, layer in whole.layers.items():
        assert all(torch.equal(resumed.layers[i][k], t) for k, t in layer.items())
    calls.append("other job")
    kvshrink.fit(model, CSKV(keep=0.25), rows, progress=False, checkpoint=tmp_path)
    assert calls[calls.index("other job") + 1 :] == [0, 1, 2], "another job's layers are not taken"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "empty"),
        (["  \n"], "empty"),
        ("too short", "tokens, less than a page of 32"),
        (torch.zeros(0, 40, dtype=torch.long), "shape"),
        (torch.zeros(2, 20, dtype=torch.long), "page of 32"),
    ],
)
def test_too_little_text_is_refused(model, data, reason):
    tokenizer = kvshrink.reference_model()[1]
    with pytest.raises(DataError, match=reason):
        kvshrink.fit(model, CSKV(), data, tokenizer=tokenizer, progress=False)


def test_nothing_to_fit_and_nan_weights_are_refused(rows):
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with pytest.raises(SettingError, match="needs no fit"):
        kvshrink.fit(net, RTN(), rows, progress=False)
    torch.nn.init.constant_(net.model.layers[1].self_attn.k_proj.weight, float("nan"))
    with pytest.raises(DataError, match="NaN"):
        kvshrink.fit(net, CSKV(keep=0.5), rows, progress=False)


def test_artifact_knows_where_it_came_from(model, rows):
    artifact = kvshrink.fit(model, CSKV(keep=0.5), rows, progress=False)
    assert artifact.provenance["rows"] == [6, 64]
    assert json.dumps(artifact.provenance)
    assert set(artifact.provenance["layers"]) == {"0", "1", "2"}


def test_query_energy_is_the_mean_over_all_rotations():
    """Golden source: turn every query by every angle and average. A pair's two channels then have the same energy."""
    rope = Rope(torch.tensor([1.0, 0.3]), 1.0, False)
    q = torch.randn(2, 6, 40, 5)  # 3 query heads read each of 2 KV heads; channel 4 is not turned
    stream = EnergyStream()
    for part in q.split(13, 2):
        stream.add(part, heads=2)
    energy = stream.mean(rope)
    angles = torch.arange(360) * torch.pi / 180
    turned = q.clone().double()[..., None].repeat(1, 1, 1, 1, 360)
    for a, b in ((0, 2), (1, 3)):
        turned[..., a, :] = q[..., a, None] * angles.cos() - q[..., b, None] * angles.sin()
        turned[..., b, :] = q[..., a, None] * angles.sin() + q[..., b, None] * angles.cos()
    wanted = turned.square().mean((0, 2, 4)).unflatten(0, (2, 3)).sum(1)
    torch.testing.assert_close(energy, wanted, rtol=1e-5, atol=0)
    assert torch.equal(energy[:, 0], energy[:, 2])
    assert not torch.equal(stream.mean(None)[:, 0], stream.mean(None)[:, 2])


def test_output_gram_is_the_squared_error_of_the_output():
    weight = torch.randn(7, 4, 3)  # hidden, query heads, channels
    gram = output_gram(weight, heads=2)
    error = torch.randn(2, 3)  # of each KV head's value; every query head reads it with weight 1
    for h in range(2):
        wanted = sum((weight[:, q] @ error[h]).square().sum() for q in (2 * h, 2 * h + 1))
        torch.testing.assert_close(error[h].double() @ gram[h] @ error[h].double(), wanted.double(), rtol=1e-4, atol=0)


def test_a_checkpoint_of_other_values_is_not_taken(tmp_path, rows):
    """The key weights are the same, the value weights are not."""
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    settings = {"progress": False, "checkpoint": tmp_path / "c"}
    before = kvshrink.fit(net, CSKV(keep=0.5), rows, **settings)
    with torch.no_grad():
        net.get_decoder().layers[0].self_attn.v_proj.weight.mul_(-1.5)
    after = kvshrink.fit(net, CSKV(keep=0.5), rows, **settings)
    fresh = kvshrink.fit(net, CSKV(keep=0.5), rows, progress=False)
    assert torch.equal(after.layers[0]["value_mean"], fresh.layers[0]["value_mean"])
    assert not torch.equal(after.layers[0]["value_mean"], before.layers[0]["value_mean"])


def test_fitting_works_under_inference_mode(model, rows):
    with torch.inference_mode():
        artifact = kvshrink.fit(model, CSKV(keep=0.5, steps=2), rows, progress=False)
    assert artifact.provenance["layers"]["0"]["training"]["loss"][0] > 0


def test_what_is_watched_is_the_input_also_without_an_input_norm(rows):
    """Olmo2's attention reads the hidden states themselves, which the layer's output then overwrites."""
    net = Olmo2ForCausalLM(Olmo2Config(**SHAPE)).eval()
    runner, seen = LayerRunner(InMemory(net), rows, 2), StatsCollector(len(rows), False)
    before = runner.hidden.clone()
    layer = net.get_decoder().layers[0]
    runner.run(0, layer, seen, layer.self_attn)
    assert torch.equal(torch.cat([x["hidden_states"] for x in seen.inputs]), before)
    assert not torch.equal(runner.hidden, before)


# --- what is given ---


def test_a_model_in_training_is_fitted_as_in_use_and_trains_on(rows):
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).eval()
    wanted = kvshrink.fit(net, CSKV(keep=0.5), rows, progress=False)
    net.train()
    net.model.layers[1].mlp.eval()
    found = kvshrink.fit(net, CSKV(keep=0.5), rows, progress=False)
    for i, fitted in wanted.layers.items():
        assert all(torch.equal(t, found.layers[i][k]) for k, t in fitted.items())
    layer = net.model.layers[1]
    assert [net.training, layer.self_attn.training, layer.mlp.training] == [True, True, False]
    with pytest.raises(DataError):
        kvshrink.fit(net, CSKV(keep=0.5), rows[:, :3], progress=False)
    assert net.training


class Words:
    """A tokenizer of one token a word."""

    bos_token_id = None

    def __call__(self, text: str, **settings) -> dict:
        return {"input_ids": [int(word) % 61 for word in text.split()]}


def test_text_and_rows_may_come_from_an_iterator(model, rows):
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    given = {"tokenizer": Words(), "length": 64, "progress": False}
    wanted = kvshrink.fit(model, CSKV(keep=0.5), texts, **given)
    for data in (iter(texts), (t for t in texts), tuple(texts), dict.fromkeys(texts).keys(), iter(rows), iter([rows])):
        found = kvshrink.fit(model, CSKV(keep=0.5), data, **given)
        assert found.provenance["calibration"] == wanted.provenance["calibration"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (3, "data of type int is no text"),
        (None, "data of type NoneType is no text"),
        (b"text", "data of type bytes is no text"),
        ({"a": "text"}, "data of type dict is no text"),
        (Path("text.txt"), r"is no text\. .*Path\(\.\.\.\)\.read_text\(\)"),
        (iter([]), "the calibration data holds nothing"),
        (["text", 3], "the calibration data holds int, str"),
        ([[1, 2, 3]], "the calibration data holds list"),
        (torch.rand(3, 64), r"token batches are torch\.float32"),
        (torch.ones(3, 64, dtype=torch.bool), r"token batches are torch\.bool"),
        (torch.full((3, 64), -1), "token ids run from -1 to -1, the model has 0 to 60"),
        (torch.full((3, 64), 61), "token ids run from 61 to 61"),
        ([torch.tensor(3)], "token batches have lengths"),
    ],
    ids=range(13),
)
def test_what_is_no_text_and_no_rows_is_refused_in_one_line(model, data, reason):
    with pytest.raises(DataError, match=rf"^[^\n]*{reason}[^\n]*$"):
        fit_all.__wrapped__(model, [CSKV(keep=0.5)], data, Words(), progress=False)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"methods": ["cskv"]}, "'cskv' is not a method"),
        ({"methods": [CSKV]}, "is not a method"),
        ({"methods": []}, "no method is given"),
        ({"methods": [RTN()]}, "rtn needs no fit"),
        ({"length": "x"}, "length='x' is not possible"),
        ({"batch": 0}, "batch=0 is not possible"),
        ({"batch": True}, "batch=True is not possible"),
        ({"tokenizer": 3}, "tokenizer=3 is not possible"),
        ({"checkpoint": 3}, "checkpoint=3 is not possible"),
        ({"log_with": []}, r"log_with=\[\] is not possible"),
    ],
    ids=str,
)
def test_arguments_that_no_fit_can_use_are_refused_in_one_line(model, rows, given, reason):
    with pytest.raises(SettingError, match=rf"^[^\n]*{reason}[^\n]*$"):
        fit_all.__wrapped__(model, **{"methods": [CSKV(keep=0.5)], "data": rows, "progress": False, **given})


def test_rows_are_long_enough_for_the_largest_page(model, rows, monkeypatch):
    monkeypatch.setattr(Palu, "page", 64)
    with pytest.raises(DataError, match="above a page of 64"):
        fit_all(model, [CSKV(keep=0.5), Palu()], rows, progress=False)


def test_a_checkpoint_of_changed_embeddings_is_not_taken(tmp_path, rows):
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    settings = {"progress": False, "checkpoint": tmp_path / "c"}
    before = kvshrink.fit(net, CSKV(keep=0.5), rows, **settings)
    net.get_input_embeddings().weight.data.mul_(3.0)
    net.get_input_embeddings().weight.data[::2].neg_()
    after = kvshrink.fit(net, CSKV(keep=0.5), rows, **settings)
    assert not torch.equal(after.layers[2]["key_mean"], before.layers[2]["key_mean"])


def test_rows_are_no_longer_than_the_context(model, monkeypatch):
    """By default: positions that a model never had would be fitted with the others."""
    text = " ".join(map(str, range(1000)))
    monkeypatch.setattr(model.config, "max_position_embeddings", 96)
    artifact = kvshrink.fit(model, CSKV(keep=0.5, window=8), text, Words(), progress=False)
    assert artifact.provenance["rows"] == [10, 96]
