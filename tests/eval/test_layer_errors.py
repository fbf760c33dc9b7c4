"""Errors of single layers: exact inputs, so that one layer's error is its own; and the peak of decoding."""

import copy

import pytest
import torch

from kvshrink import CSKV, RTN, Artifact, data, make_cache
from kvshrink.attach.identity import identity_of
from kvshrink.cache import attend
from kvshrink.errors import EvalError
from kvshrink.eval.run.layers import layer_errors
from kvshrink.eval.run.memory import decode_peak
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from tests.cache.build import bases

PREFIX, TOKENS = 200, 220


@pytest.fixture(scope="module")
def model(reference):
    return reference[0]


@pytest.fixture(scope="module")
def ids(reference):
    text = data.path("heldout.txt").read_text()[5000:]
    return reference[1](text[:9000], add_special_tokens=False)["input_ids"][:1500]


@pytest.fixture(scope="module")
def artifact(model):
    """Random bases; only layer 2 loses anything: the others keep all 128 channels."""
    shape = LayerShape(2, 64, torch.float32)
    fitted = {i: bases(shape, *((40, 40) if i == 2 else (128, 128)), seed=i) for i in range(4)}
    return Artifact(CSKV(keep=1.0), fitted, {"identity": identity_of(model).to_dict()})


@torch.no_grad()
def input_of(model, index: int, ids: list[int]) -> tuple:
    """(hidden states, position embeddings) that a layer's attention gets in one plain forward."""
    found = []
    hook = model.model.layers[index].self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: found.append((kwargs["hidden_states"], kwargs["position_embeddings"])), with_kwargs=True
    )
    model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return found[0]


def test_a_lossless_cache_has_no_errors(model, ids):
    rows = layer_errors(model, RTN(bits=None), ids[:TOKENS], PREFIX)
    assert [r.layer for r in rows] == [0, 1, 2, 3]
    for r in rows:
        assert r.key_rope_error == r.value_error == 0
        assert max(r.key_error, r.output_error) < 1e-5
        assert r.output_cosine == pytest.approx(1, abs=1e-9)


def test_errors_do_not_add_up_from_layer_to_layer(model, ids, artifact):
    rows = layer_errors(model, artifact, ids[:TOKENS], PREFIX)
    for r in rows:
        errors = (r.key_error, r.key_rope_error, r.value_error, r.output_error)
        if r.layer == 2:
            assert min(errors) > 0.01
            assert r.output_cosine < 0.9999
        else:
            assert max(errors) < 1e-5


def test_errors_of_keys_and_values_by_hand(model, ids, artifact):
    """Of what is stored: the keys before RoPE, from the layer's own input, through the basis and back."""
    hidden = input_of(model, 2, ids[: PREFIX - 1])[0]
    module, fitted = model.model.layers[2].self_attn, artifact.layers[2]
    body = slice(4, (PREFIX - 1 - 32) // 32 * 32)  # after the sinks, whole pages before the window
    (row,) = [r for r in layer_errors(model, artifact, ids[:TOKENS], PREFIX) if r.layer == 2]
    for kv, found in (("key", row.key_error), ("value", row.value_error)):
        exact = getattr(module, f"{kv[0]}_proj")(hidden)[0, body].detach()
        up = fitted[f"{kv}_up"][0]
        assert found == pytest.approx(float((exact - exact @ up.T @ up).norm() / exact.norm()), abs=1e-4)
    assert row.key_rope_error == pytest.approx(row.key_error, abs=1e-5), "a rotation keeps lengths"


def test_a_layers_output_by_hand(model, ids):
    """What the module itself gives for the first fed token, where it sees all tokens and where only the window."""
    row = layer_errors(model, StreamingLLM(window=40, sinks=0), ids[: PREFIX + 1], PREFIX)[1]
    hidden, embeddings = input_of(model, 1, ids[:PREFIX])
    full, kept = torch.ones(2, 1, 1, PREFIX, PREFIX, dtype=torch.bool).tril()
    kept = kept.clone()
    kept[..., -1, : (PREFIX - 1 - 40) // 32 * 32] = False
    module = model.model.layers[1].self_attn
    with torch.no_grad():
        exact, ours = (
            module(hidden, position_embeddings=embeddings, attention_mask=mask)[0][0, -1].double()
            for mask in (full, kept)
        )
    assert row.output_error == pytest.approx(float((exact - ours).norm() / exact.norm()), rel=1e-3)
    assert row.output_error > 0.1
    assert row.output_cosine == pytest.approx(float(torch.cosine_similarity(exact, ours, dim=0)), abs=1e-4)
    assert (row.key_error, row.key_rope_error, row.value_error) == (None, None, None)


def test_chunks_are_replayed_too(model, ids):
    """With 192 tokens filled a page has just left: chunks of 16 then read what decoding does until 29 are fed."""
    one, many = (layer_errors(model, RTN(bits=2), ids[: 193 + 29], 193, c) for c in (1, 16))
    for a, b in zip(one, many, strict=True):
        assert (a.key_error, a.value_error) == (b.key_error, b.value_error)
        assert a.output_error == pytest.approx(b.output_error, rel=1e-3)
        assert a.output_error > 0.01


def test_hooks_are_gone_afterwards_also_after_an_error(model, ids, monkeypatch):
    before = [len(layer.self_attn._forward_hooks) for layer in model.model.layers]
    layer_errors(model, RTN(bits=2), ids[:TOKENS], PREFIX)
    monkeypatch.setattr("kvshrink.eval.run.layers._Output.add", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer_errors(model, RTN(bits=2), ids[:TOKENS], PREFIX)
    assert [len(layer.self_attn._forward_hooks) for layer in model.model.layers] == before == [0] * 4


def test_an_exact_prefix_is_refused(model, ids):
    with pytest.raises(EvalError, match=r"prefix of 64 tokens is held exactly\. Use a prefix of at least 65"):
        layer_errors(model, RTN(bits=2), ids[:TOKENS], 64)
    assert layer_errors(model, RTN(bits=2), ids[:80], 65)[0].key_error > 0


@torch.inference_mode()
def test_the_peak_grows_with_the_block_and_is_more_than_the_logits(model, ids, monkeypatch):
    monkeypatch.setenv("KVSHRINK_REFERENCE", "1")  # the fused kernel has no blocks
    cache = make_cache(model, RTN(bits=4))
    model(torch.tensor([ids[:1400]]), past_key_values=cache)
    token, peaks = torch.tensor([[7]]), []
    for tokens in (32, 256, 1024):
        monkeypatch.setattr(attend, "BLOCK_ELEMENTS", tokens * 128)
        peaks.append(decode_peak(model, copy.deepcopy(cache), token))
    assert peaks == sorted(peaks)
    assert peaks[0] >= 3072 * 4, "the logits"
    # float32 keys of 2 heads of 64 channels, at least
    assert peaks[2] - peaks[0] > 2 * 64 * 4 * (1024 - 32)
    assert cache.get_seq_length() == 1400
