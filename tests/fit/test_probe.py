"""The probe: what it repeats, what it reads through codecs, and that its KL is the model's own."""

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from kvshrink import CSKV, RTN, Artifact, Spectral, fit, make_cache
from kvshrink.attach.look import layers_of
from kvshrink.errors import DataError, SettingError
from kvshrink.fit.probe import Recall
from kvshrink.fit.reader import Reader
from kvshrink.fit.recall import REPEATED, ROWS, recall_rows
from kvshrink.methods._roles import Codec
from kvshrink.methods._stats import LayerShape

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 512,
}
METHOD = RTN(bits=None, window=8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().requires_grad_(False)
    for p in net.parameters():
        p.mul_(4.0)  # so that predictions depend on the context
    return net


@pytest.fixture(scope="module")
def rows():
    return torch.randint(1, 61, (8, 128), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def probe(model, rows):
    return Recall(model, layers_of(model), rows, METHOD, progress=False)


def exact():
    return METHOD.codecs(LayerShape(2, 16, torch.float32), {})


@dataclass(frozen=True)
class Blank(Codec):
    """A codec that loses everything."""

    site = "v"
    metadata = frozenset()
    width = 16

    def encode(self, rows, valid):
        return {"rows": torch.zeros_like(rows)}

    def unpack(self, stored):
        return stored["rows"]

    def expand(self, latent, heads):
        return latent

    def page_bytes(self):
        return 0


def test_a_row_repeats_a_passage_that_lies_before_the_window(rows):
    made = recall_rows(rows, 512, METHOD)
    tail, stream = 512 // REPEATED, rows.flatten()
    assert made.shape == (ROWS, 512)
    for row in made.tolist():
        context, passage = row[:-tail], row[-tail:]
        places = [i for i in range(len(context) - tail + 1) if context[i : i + tail] == passage]
        assert places, "the repetition must be in the context"
        assert min(places) >= METHOD.sinks
        assert max(places) + tail <= len(context) - METHOD.window
        assert context[0] == int(rows[0, 0])
        text = "".join(map(chr, context[1:]))
        assert text in "".join(map(chr, stream.tolist()))


def test_lossless_costs_nothing_and_losing_all_costs_much(probe):
    whole = probe.kl({0: exact(), 1: exact()})
    assert whole < 1e-6
    assert probe.kl({}) < 1e-9
    assert probe.kl({0: (None, Blank()), 1: (None, Blank())}) > 0.05
    assert probe.kl({0: (None, Blank())}) != probe.kl({1: (None, Blank())})


def test_kl_is_that_of_the_real_cache(model, rows, probe):
    """Against make_cache: the same row prefilled, then its tail in one forward over the store."""
    method = RTN(bits=2, window=8)
    pair = method.codecs(LayerShape(2, 16, torch.float32), {})
    got, total = probe.kl({0: pair, 1: pair}), 0.0
    for row in recall_rows(rows, 512, METHOD)[:, None]:
        context, tail = row[:, : -512 // REPEATED], row[:, -512 // REPEATED :]
        logs = []
        for cache in (DynamicCache(config=model.config), make_cache(model, method)):
            with torch.no_grad():
                model(context, past_key_values=cache)
                logs.append(model(tail, past_key_values=cache).logits[0].log_softmax(-1))
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()) / ROWS
    assert got == pytest.approx(total, rel=1e-3)
    assert got > 1e-4


def test_sinks_and_window_stay_exact(model, rows):
    """A window as long as the context leaves nothing to lose."""
    probe = Recall(model, layers_of(model), rows, RTN(bits=None, window=8), progress=False)
    probe.reader.method = RTN(bits=None, window=600)
    assert probe.kl({0: (None, Blank())}) < 1e-9


def test_an_answer_is_asked_once(probe):
    calls = []
    assert probe.once("a", lambda: calls.append(1) or 2.0) == 2.0
    assert probe.once("a", lambda: calls.append(1) or 3.0) == 2.0
    assert len(calls) == 1


def test_too_little_text_is_refused(rows):
    stream = rows.flatten()[None]
    with pytest.raises(DataError, match=r"^88 calibration tokens are too few .* Give 92 or more\.$"):
        recall_rows(stream[:, :88], 512, METHOD)
    assert recall_rows(stream[:, :92], 512, METHOD).shape == (ROWS, 92)


def test_sliding_layers_are_read_at_their_true_positions(rows):
    """A model whose first layer slides: the exact predictions are those of one plain forward."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    net = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=32, layer_types=kinds)).eval()
    reader, ids = Reader(net, layers_of(net), METHOD), rows.flatten()[None, :300]
    with torch.no_grad():
        ours = reader.predict(reader.prefill(ids[:, :260]), {}, ids[:, 260:])
        plain = net(ids).logits[0, 260:].log_softmax(-1)
    torch.testing.assert_close(ours[0], plain, atol=1e-4, rtol=0)


def test_a_kl_that_is_no_number_is_refused(probe, monkeypatch):
    monkeypatch.setattr(probe, "wanted", probe.wanted * float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        probe.kl({})


# --- a method that asks ---


def test_spectral_from_fit_to_file_and_cache(model, rows, tmp_path):
    artifact = fit(model, Spectral(budget=0.1, window=8), rows, progress=False)
    assert set(artifact.provenance["widths"]) == {"0 key", "0 value", "1 key", "1 value"}
    back = Artifact.from_pretrained(artifact.save_pretrained(tmp_path / "a"))
    assert back.method == artifact.method
    tokens, caches = torch.randint(1, 61, (2, 400)), [make_cache(model, a) for a in (artifact, back)]
    with torch.no_grad():
        outs = [[model(p, past_key_values=c).logits for p in tokens.split([390, 10], 1)][1] for c in caches]
    assert torch.equal(*outs)
    body = [x for layer in caches[0].compressed for x in layer.pages.tensors()]
    pages = len(caches[0].compressed[0].pages)
    held, full = sum(t.nbytes for t in body), pages * 32 * 2 * 2 * 2 * 16 * 2 * 4
    assert 0.9 * 0.1 < held / full <= 0.1
    assert artifact.nbytes < sum(t.nbytes for x in artifact.layers.values() for t in x.values()), "curves are no cost"


def test_what_asks_the_model_cannot_be_fitted_from_disk(model, rows, tmp_path):
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(SettingError, match=r"^spectral asks the whole model .* Load the model and pass it to fit\.$"):
        fit(tmp_path / "m", Spectral(), rows, progress=False)
    assert fit(tmp_path / "m", Spectral(allocation="energy"), rows, progress=False).layers
    assert not CSKV().probes
