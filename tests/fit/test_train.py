"""Training after the closed form: gradients, the guard, held-out rows, ranks drawn, and what is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.attach.asking import key_value
from kvshrink.attach.families import shape_of
from kvshrink.attach.look import layers_of
from kvshrink.errors import DataError, SettingError
from kvshrink.fit.allocate import _output_error
from kvshrink.fit.distil import PredictionLoss
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.outputs import OutputLoss
from kvshrink.fit.reconstruct import RowLoss
from kvshrink.fit.soft import Soft
from kvshrink.fit.source import InMemory
from kvshrink.methods.lowrank.cskv import DRAWN

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 128,  # so that rows of predictions are no longer than the others
    "initializer_range": 0.3,  # attention that is not nearly uniform
}
LOSSES = ("rows", "output", "kl")
RECORD = {"rows": RowLoss, "output": OutputLoss, "kl": PredictionLoss}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 61, (12, 128), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def seen(model, rows):
    """(keys, values, arguments of the attention) of the first layer, in batches of 5."""
    found = []
    runner = LayerRunner(InMemory(model), rows, batch=5)
    layer = model.get_decoder().layers[0]
    runner.run(0, layer, lambda m, k: found.append((*key_value(m, k), k)), layer.self_attn)
    keys, values, kwargs = zip(*found, strict=True)
    return torch.cat(keys), torch.cat(values), list(kwargs)


def fit(model, rows, **settings):
    settings = {"keep": 0.25, "window": 8, "lr": 3e-3, **settings}
    return kvshrink.fit(model, CSKV(**settings), rows, batch=5, progress=False)


def records(artifact):
    """The records of training: one per layer, or one for all."""
    joint = artifact.provenance.get("training")
    return [joint] if joint else [r["training"] for r in artifact.provenance["layers"].values()]


def loss_of(name, model, rows, seen):
    """(loss, layers it reads)."""
    infos, method = layers_of(model), CSKV(keep=0.25, window=8, bits=2)
    if name == "rows":
        return RowLoss(seen[0], seen[1], 32), [0]
    if name == "output":
        return OutputLoss(infos[0], seen[2], 32), [0]
    return PredictionLoss(model, infos, rows, method), [0, 1]


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(model, rows, seen, name):
    loss, layers = loss_of(name, model, rows, seen)
    method, fitted = CSKV(keep=0.25), fit(model, rows, init="random").layers
    tensors = {i: dict(fitted[i]) for i in layers}  # away from the optimum, where the gradient would be 0
    for i in layers:
        for kv in ("key", "value"):
            tensors[i][f"{kv}_down"] = 0.8 * tensors[i][f"{kv}_up"].transpose(1, 2).contiguous()

    def value(tensors) -> torch.Tensor:
        shape = shape_of(layers_of(model)[0])
        return loss({i: tuple(Soft(c, False) for c in method.codecs(shape, t)) for i, t in tensors.items()}, 0)

    for part in ("key_up", "key_down", "value_up", "value_down", "value_mean"):
        probe = {i: dict(t) for i, t in tensors.items()}
        probe[0][part] = tensors[0][part].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(probe), probe[0][part])
        at, step = int(gradient.abs().argmax()), 1e-2
        found = []
        for sign in (1, -1):
            moved = {i: dict(t) for i, t in tensors.items()}
            moved[0][part] = tensors[0][part].clone()
            moved[0][part].view(-1)[at] += sign * step
            with torch.no_grad():
                found.append(float(value(moved)))
        assert float(gradient.flatten()[at]) == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.03), part


@pytest.mark.parametrize("name", LOSSES)
def test_an_absurd_step_gives_the_closed_form_back(model, rows, name):
    plain, absurd = fit(model, rows, bits=4), fit(model, rows, bits=4, loss=name, steps=5, lr=10.0)
    for record in records(absurd):
        assert record["kept"] == "closed form"
        after = record["held_out"]["trained"]
        assert after is None or after > record["held_out"]["closed form"]
    for i, layer in plain.layers.items():
        assert layer.keys() == absurd.layers[i].keys()
        assert all(torch.equal(absurd.layers[i][k], t) for k, t in layer.items())
        for error in ("key_error", "value_error"):
            wanted = plain.provenance["layers"][str(i)][error]
            assert absurd.provenance["layers"][str(i)][error] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_training_pays_where_the_start_is_poor_and_leaves_the_model_alone(model, rows, name, dtype):
    net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    net.load_state_dict(model.state_dict())
    net = net.to(dtype)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    # the 4 sinks are of the first page, and exact: predictions gain less, and later, than the other losses
    many, lr, most = (40, 5e-3, 0.99) if name == "kl" else (25, 2e-2, 0.98)
    start, trained = (fit(net, rows, init="random", loss=name if s else "rows", steps=s, lr=lr) for s in (0, many))
    for record in records(trained):
        assert record["kept"] == "trained"
        assert record["held_out"]["trained"] < most * record["held_out"]["closed form"]
    for i, layer in trained.layers.items():
        assert {t.dtype for t in layer.values()} == {torch.float32}
        assert not torch.equal(layer["key_up"], start.layers[i]["key_up"])
        assert not torch.equal(layer["value_down"], layer["value_up"].transpose(1, 2))
    for k, p in net.named_parameters():
        assert torch.equal(p, before[k])
        assert p.requires_grad
        assert p.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_quantisation_aware_training_of_two_bits_pays_or_is_not_kept(model, rows, name):
    """In its own loss, through the quantiser, on the rows held out."""
    for record in records(fit(model, rows, bits=2, qat=True, loss=name, steps=30)):
        start, after = record["held_out"]["closed form"], record["held_out"]["trained"]
        assert after < start if record["kept"] == "trained" else after >= start
        if name == "output":
            assert record["kept"] == "trained"


def test_the_guard_reads_what_a_cache_would_hold(model, rows, seen):
    """Golden source: the codecs with their real packed codes, on the held-out row."""
    artifact = fit(model, rows, bits=2, loss="output", steps=1)
    info = layers_of(model)[0]
    codecs = CSKV(keep=0.25, bits=2).codecs(shape_of(info), fit(model, rows, bits=2).layers[0])
    last = {k: v[-1:] if k == "hidden_states" else v for k, v in seen[2][-1].items()}
    wanted = _output_error(info.module, info.rope, codecs, 32, last)
    assert records(artifact)[0]["held_out"]["closed form"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_held_out_are_never_trained_on(model, name, monkeypatch):
    """The last row has tokens of its own; no step of training sees them, and the guard sees nothing else."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 30, (9, 128), generator=generator)
    rows[-1] = torch.randint(30, 61, (128,), generator=generator)
    known = torch.cat([key_value(*x)[0] for x in _inputs(model, rows[-1:])])
    calls, cls = [], RECORD[name]
    original = cls.__call__

    def spy(self, codecs, row):
        if name == "kl":
            other = bool((self.rows[row][:, 1:] >= 30).all())
        elif name == "rows":
            other = torch.allclose(self.rows[0][row], known[0], atol=1e-5)
        else:
            keys = key_value(self.module, self.rows[row])[0]
            other = keys.shape == known.shape and torch.allclose(keys, known, atol=1e-5)
        calls.append((torch.is_grad_enabled(), other))
        return original(self, codecs, row)

    monkeypatch.setattr(cls, "__call__", spy)
    layers = LlamaConfig(**SHAPE).num_hidden_layers if name != "kl" else 1
    fit(model, rows, loss=name, steps=20)
    first = calls[: len(calls) // layers]  # the first layer, whose keys are known
    assert first.count((True, False)) == 20
    assert (True, True) not in first
    assert (False, False) not in first
    assert (False, True) in first


def _inputs(model, rows):
    found = []
    runner = LayerRunner(InMemory(model), rows, batch=1)
    layer = model.get_decoder().layers[0]
    runner.run(0, layer, lambda m, k: found.append((m, k)), layer.self_attn)
    return found


def test_a_single_row_is_cut_in_two(model, rows):
    artifact = fit(model, rows[:1], loss="output", steps=2)
    assert artifact.provenance["rows"] == [2, 64]
    with pytest.raises(DataError, match=r"^rows of shape \(1, 120\) .* halves of rows: 60 tokens a row, not 64\.$"):
        fit(model, rows[:1, :120], loss="output", steps=2)
    with pytest.raises(DataError, match=r"^rows of shape \(1, 60\) .* half of a row: 30 tokens a row, not 33\.$"):
        fit(model, rows[:1, :60], steps=2)
    assert fit(model, rows[:1, :60]).provenance["rows"] == [1, 60], "nothing is trained, nothing is cut"


def test_the_same_settings_give_the_same_tensors(model, rows):
    one, two = (fit(model, rows, bits=4, loss="output", steps=8, qat=True, matryoshka=True) for _ in range(2))
    for i, layer in one.layers.items():
        assert all(torch.equal(two.layers[i][k], t) for k, t in layer.items())


def test_predictions_need_the_whole_model(model, rows, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match=r"^cskv asks the whole model what a loss costs\. Load the model .*\.$"):
        kvshrink.fit(tmp_path, CSKV(loss="kl", steps=2), rows, progress=False)


def test_a_fit_by_predictions_resumes(model, rows, tmp_path):
    method = CSKV(keep=0.25, window=8, loss="kl", steps=4, lr=1e-3, init="random")
    whole = kvshrink.fit(model, method, rows, batch=5, progress=False, checkpoint=tmp_path)
    (tmp_path / "layer_001_0.safetensors").unlink()
    again = kvshrink.fit(model, method, rows, batch=5, progress=False, checkpoint=tmp_path)
    for i, layer in whole.layers.items():
        assert not any(k.endswith("_covariance") for k in layer)
        assert all(torch.equal(again.layers[i][k], t) for k, t in layer.items())


# --- fewer components from one fit ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 4, "group_heads": 1},
        {"init": "asvd"},
        {"key_share": 0.3},
        {"key_metric": "query", "value_metric": "output"},
    ],
    ids=str,
)
def test_a_closed_form_cut_is_the_fit_at_the_lower_keep(model, rows, settings):
    high, low = fit(model, rows, keep=0.8, **settings), fit(model, rows, keep=0.4, **settings)
    cut = high.at(0.4)
    assert cut.method == low.method
    assert cut.provenance["cut_from"] == 0.8
    for i, layer in low.layers.items():
        assert layer.keys() == cut.layers[i].keys()
        for k, t in layer.items():
            torch.testing.assert_close(cut.layers[i][k], t, rtol=1e-5, atol=1e-6)
        for error in ("key_error", "value_error"):
            wanted = low.provenance["layers"][str(i)][error]
            assert cut.provenance["layers"][str(i)][error] == pytest.approx(wanted, rel=1e-4)
    cache = kvshrink.make_cache(model, cut)
    model.generate(rows[:1], past_key_values=cache, max_new_tokens=2, do_sample=False)
    kvshrink.detach(model)
    assert torch.equal(high.at(0.8).layers[0]["key_up"], high.layers[0]["key_up"])


def test_a_cut_keeps_the_share_that_was_chosen(model, rows):
    high = fit(model, rows, keep=0.8, key_share="auto")
    for i, record in high.provenance["layers"].items():
        low = fit(model, rows, keep=0.4, key_share=record["key_share"])
        assert high.at(0.4).layers[int(i)]["key_up"].shape == low.layers[int(i)]["key_up"].shape


def test_what_cannot_be_cut_is_refused(model, rows):
    artifact = fit(model, rows, keep=0.5)
    with pytest.raises(SettingError, match=r"^keep=0\.6 is above the artifact's 0\.5\. Components can only .*\.$"):
        artifact.at(0.6)
    with pytest.raises(SettingError, match=r"^the artifact was trained for one rank only\. Fit with matryoshka=True"):
        fit(model, rows, steps=1).at(0.2)
    with pytest.raises(SettingError, match=r"^rtn has no components to leave out\. .*\.$"):
        kvshrink.Artifact(RTN(), {}).at(0.2)


def test_ranks_drawn_in_training_make_leading_components_good(model, rows, seen):
    """From a random basis, whose components have no order: the first quarter is better where ranks were drawn."""
    settings = {"keep": 0.5, "init": "random", "steps": 100, "lr": 1e-2}
    drawn, fixed = fit(model, rows, matryoshka=True, **settings), fit(model, rows, **settings)
    loss, shape = RowLoss(seen[0], seen[1], 32), shape_of(layers_of(model)[0])
    error = {}
    for name, artifact in (("drawn", drawn), ("fixed", fixed)):
        assert records(artifact)[0]["kept"] == "trained"
        for share in (DRAWN[0], 1.0):
            lower = CSKV(keep=0.5 * share)
            pair = lower.codecs(shape, lower.cut(artifact.layers[0], {}))
            error[name, share] = float(loss({0: tuple(Soft(c, False) for c in pair)}, loss.trained))
    assert error["drawn", 0.25] < 0.9 * error["fixed", 0.25]
    assert error["drawn", 1.0] < error["drawn", 0.25]
    assert drawn.at(0.125).layers[0]["value_up"].shape == (1, 2, 16)


@pytest.mark.parametrize(("codec", "bits"), [("saw_int4", 4), ("fp8", None), ("vidkv", None)])
def test_training_goes_through_a_codec_that_learns_nothing(model, rows, codec, bits):
    """Also one that has no bits of its own to set."""
    method = CSKV(keep=0.5, bits=bits, codec=codec, steps=3, qat=True)
    artifact = kvshrink.fit(model, method, rows, progress=False)
    held_out = artifact.provenance["layers"]["0"]["training"]["held_out"]
    plain = kvshrink.fit(model, CSKV(keep=0.5, steps=3), rows, progress=False).provenance["layers"]["0"]["training"]
    assert held_out["closed form"] > plain["held_out"]["closed form"], "held-out rows are read as the cache will"


@pytest.mark.parametrize("codec", ["oscar", "zipcache"])
def test_a_codec_that_needs_the_basis_or_queries_is_not_trained_through(codec):
    with pytest.raises(SettingError, match="with steps is not possible"):
        CSKV(codec=codec, steps=3)
