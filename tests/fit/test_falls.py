"""Parts of the KL: half of its slope towards the exact rows, by finite differences; and that they add up."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvshrink.attach.look import layers_of
from kvshrink.errors import DataError
from kvshrink.fit import falls
from kvshrink.fit.falls import Falls
from kvshrink.fit.probe import Recall
from kvshrink.fit.reader import Reader
from kvshrink.fit.recall import recall_rows
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.rtn import RTN

METHOD = RTN(bits=None, window=8)
SHAPE = LayerShape(2, 16, torch.float64)
STEP = 1e-4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, head_dim=16, vocab_size=61, max_position_embeddings=512)
    net = LlamaForCausalLM(config).eval().double()
    for p in net.parameters():
        p.data.mul_(4.0)
    return net


@pytest.fixture(scope="module")
def rows():
    return torch.randint(1, 61, (8, 128), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured(model, rows):
    made = recall_rows(rows, 240, METHOD, 8, plain=True, repeated=12)
    return Falls(Reader(model, layers_of(model), METHOD), made, 20)


def codecs(bits):
    pair = RTN(bits=bits).codecs(SHAPE, {})
    return {0: pair, 1: pair}


def loss(measured, turn, cache):
    with torch.no_grad():
        return float(
            falls._loss(falls._kl(turn, measured.reader.model(input_ids=turn.tail, past_key_values=cache).logits))
        )


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_part_is_half_of_the_slope_towards_the_exact_rows(measured, number):
    found, turn = measured.parts(codecs(2), number).of, measured.turns[number % 2]
    assert set(found) == {(i, kv) for i in (0, 1) for kv in ("key", "value")}
    for (i, kv), part in found.items():
        ends = []
        for share in (-STEP, STEP):
            cache = measured.reader.lossy(turn.exact, codecs(2))
            name = kv + "s"
            rows, exact = getattr(cache.layers[i], name), getattr(turn.exact.layers[i], name)
            setattr(cache.layers[i], name, rows + share * (exact - rows))
            ends.append(loss(measured, turn, cache))
        # differences of float32 sums, which differ by processor
        assert part == pytest.approx((ends[0] - ends[1]) / (2 * STEP) / 2, rel=3e-2, abs=1e-4)


def test_parts_of_a_small_loss_add_up_to_it(measured):
    """KL is then a square of the errors, and its logarithm falls twice as fast."""
    assert sum(measured.parts(codecs(8), 0).of.values()) == pytest.approx(1, rel=0.02)


def test_kl_is_that_of_the_rows(measured):
    turn = measured.turns[1]
    with torch.no_grad():
        found = measured.reader.predict(turn.exact, codecs(2), turn.tail)
    total = float((turn.wanted.exp() * (turn.wanted - found)).sum(-1).mean())
    assert measured.parts(codecs(2), 1).kl == pytest.approx(total, rel=1e-4)
    assert total > 1e-4


def test_only_what_goes_through_a_codec_has_a_part(measured):
    key, value = RTN(bits=2).codecs(SHAPE, {})
    assert set(measured.parts({1: (None, value)}, 0).of) == {(1, "value")}
    assert set(measured.parts({0: (key, None), 1: (None, None)}, 0).of) == {(0, "key")}


def test_what_loses_nothing_has_no_part(measured):
    assert all(abs(part) < 1e-6 for part in measured.parts(codecs(None), 0).of.values())


def test_nothing_of_the_model_is_changed(model, measured):
    model.requires_grad_(True)
    measured.parts(codecs(4), 0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_every_other_row_goes_on(rows):
    made = recall_rows(rows, 240, METHOD, 4, plain=True, repeated=12)
    for n, row in enumerate(made.tolist()):
        context, tail = row[:-20], row[-20:]
        repeats = any(context[i : i + 20] == tail for i in range(len(context) - 19))
        assert repeats == (n % 2 == 0)


def test_a_model_without_a_gradient_is_told(measured, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("derivative for aten::_int_mm is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(DataError, match=r"^the model has no gradient \(derivative .* as spectral:allocation=energy\.$"):
        measured.parts(codecs(4), 0)


def test_memory_that_runs_out_is_no_missing_gradient(measured, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(torch.OutOfMemoryError):
        measured.parts(codecs(4), 0)


def test_predictions_that_are_no_numbers_are_refused(measured, monkeypatch):
    monkeypatch.setattr(falls, "_loss", lambda kl: kl.sum() * float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        measured.parts(codecs(4), 0)


def test_a_rough_probe_takes_near_budgets_as_one(model, rows):
    exact, rough = (Recall(model, layers_of(model), rows, METHOD, False, rough=rough) for rough in (False, True))
    assert exact.near(1234) == 1234
    assert rough.near(1000) == rough.near(1100) != rough.near(1500)
    assert 0.83 < rough.near(1234) / 1234 < 1.2
