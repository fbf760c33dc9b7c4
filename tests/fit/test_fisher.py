"""Fisher information against finite differences of the loss."""

import sys

import pytest
import torch
from transformers import LlamaForCausalLM, Phi3ForCausalLM

from kvshrink.attach.asking import key_value
from kvshrink.attach.look import keywords, layers_of
from kvshrink.attach.projections import key_value_parts
from kvshrink.errors import DataError
from kvshrink.fit.fisher import squared_gradients
from kvshrink.fit.probe import Recall
from kvshrink.methods.lowrank.palu import Palu

SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 23,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@pytest.fixture(params=["separate", "fused"])
def model(request):
    torch.manual_seed(0)
    net = {"separate": LlamaForCausalLM, "fused": Phi3ForCausalLM}[request.param]
    net = net(net.config_class(**SHAPE))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)  # at its initial scale hardly anything depends on keys
    return net.double().eval()


def loss_of(model, row: torch.Tensor, tail: int) -> float:
    with torch.no_grad():
        found = model(input_ids=row[None]).logits[0, -tail - 1 : -1].log_softmax(-1)
    return -float(found.gather(-1, row[-tail:, None]).mean())


def test_squared_gradients_are_those_of_finite_differences(model):
    rows, tail = torch.randint(0, 23, (2, 24)), 6
    infos = dict(enumerate(layers_of(model)))
    got = squared_gradients(model, infos, rows, tail)
    assert got.keys() == {0, 1}
    for layer in infos:
        for kv, (weight, channels) in enumerate(key_value_parts(infos[layer].module)):
            part, wanted = weight.data[channels], 0.0
            for at in [(i, j) for i in range(part.shape[0]) for j in range(part.shape[1])]:
                for row in rows:
                    value, ends = float(part[at]), []
                    for step in (5e-4, -5e-4):
                        part[at] = value + step
                        ends.append(loss_of(model, row, tail))
                    part[at] = value
                    wanted += ((ends[0] - ends[1]) / 1e-3) ** 2
            assert got[layer][kv] == pytest.approx(wanted, rel=1e-3)  # norms and the loss are in float32
            assert wanted > 0


def test_nothing_is_left_behind(model):
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        squared_gradients(model, dict(enumerate(layers_of(model))), torch.randint(0, 23, (1, 24)), 6)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_asks_for_its_repeated_passage_once(model, monkeypatch):
    model, calls = model.float(), []
    rows = torch.randint(0, 23, (4, 200))
    probe = Recall(model, layers_of(model), rows, Palu(), progress=False)
    told = {0: (1.0, 2.0)}
    monkeypatch.setattr(sys.modules[Recall.__module__], "squared_gradients", lambda *a: calls.append(a) or told)
    assert probe.fisher() is probe.fisher()
    ((_, infos, made, tail),) = calls
    assert infos.keys() == {0, 1}
    assert (made[:, -tail:] == probe.made[:, -probe.tail :]).all()


def test_weights_without_a_gradient_and_losses_without_one_are_refused(model):
    infos = dict(enumerate(layers_of(model)))
    broken = next(iter(key_value_parts(infos[1].module)))[0]
    with torch.no_grad():
        broken.fill_(float("nan"))
    with pytest.raises(DataError, match=r"^the loss has a gradient that is NaN or infinite [^\n]+$"):
        squared_gradients(model, infos, torch.randint(0, 23, (1, 24)), 6)
    broken.requires_grad_(False)
    broken.data = broken.data.nan_to_num().to(torch.int8)
    with pytest.raises(DataError, match=r"^weights stored as torch\.int8 have no gradient\. [^\n]+$"):
        squared_gradients(model, infos, torch.randint(0, 23, (1, 24)), 6)


def test_the_rows_of_a_fused_weight_are_those_that_make_keys_and_values(model):
    hidden = torch.randn(1, 5, 8, dtype=torch.float64)
    for info in layers_of(model):
        made = key_value(info.module, keywords(model, info.module, info.kind, hidden, torch.arange(5)[None]))
        for (weight, channels), rows in zip(key_value_parts(info.module), made, strict=True):
            torch.testing.assert_close((hidden @ weight[channels].T)[:, None], rows)
