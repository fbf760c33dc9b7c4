"""Perplexity: each mode against the model's own forward pass, against each other, and what must be refused."""

from math import exp, log

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from kvshrink import CSKV, RTN, Artifact, data
from kvshrink.attach.identity import identity_of
from kvshrink.errors import EvalError
from kvshrink.eval.run.perplexity import MODES, perplexity, scored_bytes, tracks
from kvshrink.eval.run.simulated import simulate
from kvshrink.eval.run.teacher import compare, follow
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from tests.cache.build import bases
from tests.scenarios.families import FAMILIES

PREFIX, TOKENS = 300, 360
LOSSLESS, LOSSY = RTN(bits=None), RTN(bits=2)


@pytest.fixture(scope="module")
def model(reference):
    return reference[0]


@pytest.fixture(scope="module")
def ids(reference):
    tokenizer = reference[1]
    text = data.path("heldout.txt").read_text()[5000:9000]
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:700]


@pytest.fixture(scope="module")
def own(model, ids):
    """NLL of ids[PREFIX:TOKENS] from one plain forward pass, by cross entropy."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:TOKENS]]), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(
        logits[PREFIX - 1 : -1], torch.tensor(ids[PREFIX:TOKENS]), reduction="none"
    )


# --- all modes ---


@pytest.mark.parametrize("mode", MODES)
def test_a_lossless_cache_scores_as_one_plain_forward(model, ids, own, mode):
    track = tracks(model, {"same": LOSSLESS, "full": None}, ids[:TOKENS], mode, PREFIX)
    for label in ("same", "full"):
        assert track[label].nll == pytest.approx(own.numpy(), abs=1e-4)
        assert track[label].nll_full == pytest.approx(own.numpy(), abs=1e-4)
        assert track[label].kl.max() < 1e-5
        assert track[label].top1.mean() == 1
        assert track[label].top5.mean() == 1
    assert track["same"].exercised == 1
    assert track["full"].exercised == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_lossy_cache_does_not(model, ids, mode):
    track = tracks(model, {"lossy": LOSSY}, ids[:TOKENS], mode, PREFIX)["lossy"]
    assert np.abs(track.nll - track.nll_full).max() > 0.05
    assert track.kl.mean() > 1e-3
    assert track.kl.min() >= 0
    assert track.top1.mean() < 1
    assert track.dp == pytest.approx(np.exp(-track.nll) - np.exp(-track.nll_full), abs=1e-6)
    assert track.byte_ratio is None if mode == "simulated" else track.byte_ratio < 0.3


def test_several_methods_at_once_score_as_each_alone(model, ids):
    methods = {"a": LOSSY, "b": StreamingLLM(window=32), "c": RTN(bits=4, window=8, sinks=0)}
    together = follow(model, methods, ids[:TOKENS], PREFIX, 7)
    for label, method in methods.items():
        alone = follow(model, {label: method}, ids[:TOKENS], PREFIX, 7)[label]
        assert np.array_equal(alone.nll, together[label].nll)
        assert np.array_equal(alone.compressed, together[label].compressed)


def test_what_is_compared_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/8, 1/8, 3/4): KL(p || q) = 1/2 ln 4 + 1/4 ln 2 + 1/4 ln 1/3."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.125, 0.125, 0.75]])
    nll, nll_full, kl, top1, top5, dp = compare(p.log() + 3, q.log() - 1, torch.tensor([0]))[:, 0].tolist()
    assert (nll, nll_full) == pytest.approx((log(8), log(2)))
    assert kl == pytest.approx(1.25 * log(2) - 0.25 * log(3))
    assert (top1, top5) == (0, 1)
    assert dp == pytest.approx(-0.375)


def test_the_five_likeliest_are_counted():
    full = torch.arange(8.0)[None]
    ours = torch.tensor([[9.0, 8.0, 0, 0, 0, 5, 6, 7]])  # tokens 0, 1, 7, 6, 5 against 7, 6, 5, 4, 3
    assert compare(full, ours, torch.tensor([0]))[4].item() == pytest.approx(3 / 5)


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])  # sliding layers and a softcap; a layer without RoPE
def test_other_families_are_scored_too(family):
    other = FAMILIES[family].build()
    ids = torch.randint(2, 97, (130,)).tolist()
    with torch.inference_mode():
        logits = other(torch.tensor([ids]), use_cache=False).logits[0, 99:-1]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[100:]), reduction="none").numpy()
    methods = {"same": RTN(bits=None, window=8), "lossy": RTN(bits=2, window=8)}
    for mode in MODES:
        track = tracks(other, methods, ids, mode, 100)
        assert track["same"].nll == pytest.approx(wanted, abs=1e-3)
        assert track["lossy"].nll_full == pytest.approx(wanted, abs=1e-3)
        assert track["lossy"].kl.mean() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_full_attention_is_refused(mode):
    with pytest.raises(EvalError, match="all 2 layers of this model have sliding-window attention"):
        tracks(FAMILIES["mistral_sliding"].build(), {"x": LOSSY}, list(range(2, 90)), mode, 80)


# --- decode and chunked ---


def test_chunks_of_one_are_decoding(model, ids):
    decoded, chunked = (
        tracks(model, {"x": LOSSY}, ids[: PREFIX + 20], mode, PREFIX, 1)["x"] for mode in ("decode", "chunked")
    )
    assert np.array_equal(decoded.nll, chunked.nll)
    assert np.array_equal(decoded.kl, chunked.kl)


def in_phase(method, at_least: int) -> int:
    """A prefix with whose fill, of one token fewer, a page has just left: the next ones leave with every page-th token
    from there, the last of a chunk."""
    spill = method.window % method.page
    return next(n for n in range(at_least, at_least + method.page) if n % method.page == spill) + 1


@pytest.mark.parametrize("method", [RTN(bits=2, window=40, sinks=0), StreamingLLM(window=50, sinks=3)])
@pytest.mark.parametrize("off", [0, 16])
def test_chunks_of_a_page_are_decoding_in_one_phase_only(model, ids, method, off):
    prefix = in_phase(method, 250) + off
    decoded, chunked = (follow(model, {"x": method}, ids[: prefix + 70], prefix, c)["x"] for c in (1, method.page))
    same = np.abs(decoded.nll - chunked.nll).max() < 1e-4
    assert same == np.array_equal(decoded.compressed, chunked.compressed) == (off == 0)


@pytest.mark.parametrize("off", [1, 30, 31])
def test_chunks_see_at_most_a_chunk_more_in_whole_pages(model, ids, off):
    """chunk - 1 tokens more are exact than in decoding, rounded up to pages."""
    prefix, page = in_phase(LOSSY, 250) + off, LOSSY.page
    decoded = follow(model, {"x": LOSSY}, ids[: prefix + 70], prefix)["x"]
    for chunk in (8, 32, 48):
        chunked = follow(model, {"x": LOSSY}, ids[: prefix + 70], prefix, chunk)["x"]
        more = decoded.compressed - chunked.compressed
        assert set(more % page) == {0}
        assert 0 < more.max() <= -(-(chunk - 1) // page) * page
        assert more.min() == 0


def test_what_is_compressed_is_counted_from_the_cache(model, ids):
    """Window 8, page 32: of 40 tokens a page has left, so the 41st prediction is the first to read it."""
    track = follow(model, {"x": RTN(bits=2, window=8, sinks=0)}, ids[:60], 1)["x"]
    assert track.compressed.tolist() == [0] * 40 + [32] * 19
    assert track.exercised == pytest.approx(19 / 59)
    assert track.kl[:40].max() < 1e-5
    assert track.kl[40:].min() > 1e-5
    dropped = follow(model, {"x": StreamingLLM(window=8, sinks=4)}, ids[:60], 0)["x"]
    assert dropped.compressed.tolist() == [0] * 40 + [28] * 19


# --- prefix_compressed ---


def test_recovered_gain_is_one_with_the_full_cache_and_less_without_most_of_it(model, ids):
    full, same, few = (
        perplexity(model, m, ids[:TOKENS], mode="prefix_compressed", prefix=PREFIX)
        for m in (None, LOSSLESS, StreamingLLM(window=1, sinks=1))
    )
    assert full.nll_none > full.nll_full + 0.05, "the prefix helps this model"
    assert full.gain == 1
    assert same.gain == pytest.approx(1, abs=1e-3)
    assert few.gain == pytest.approx((few.nll_none - few.nll) / (few.nll_none - few.nll_full))
    assert few.gain < 0.9
    assert few.chunk == few.positions == 60


def test_nothing_before_the_continuation_means_nothing(model, ids):
    given = torch.tensor([[ids[0], *ids[PREFIX - 1 : TOKENS]]])
    with torch.inference_mode():
        logits = model(given, use_cache=False).logits[0, 1:-1]
    wanted = torch.nn.functional.cross_entropy(logits, given[0, 2:])
    found = perplexity(model, None, ids[:TOKENS], mode="prefix_compressed", prefix=PREFIX)
    assert found.nll_none == pytest.approx(float(wanted), abs=1e-4)


# --- simulated ---


def test_simulated_rtn_is_the_model_with_rounded_keys_and_values(model, ids, monkeypatch):
    """By hand: keys after RoPE per channel over 32 tokens, the last page short; values per token, 32 channels."""
    tokens = 330  # 329 are read: 10 pages and 9 tokens
    turn, top = modeling_llama.apply_rotary_pos_emb, 3

    def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale, low = ((high - low) / top).half().float(), low.half().float()
        return ((x - low) / scale).round().clamp(0, top) * scale + low

    def turn_and_round(query, key, *args):
        query, key = turn(query, key, *args)
        return query, torch.cat([rounded(page, 2) for page in key.split(32, 2)], 2)

    simulated = simulate(model, {"x": LOSSY}, ids[:tokens], PREFIX)["x"]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn_and_round)
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(
            lambda m, args, out: rounded(out.unflatten(-1, (-1, 32)), -1).flatten(2)
        )
        for layer in model.model.layers
    ]
    try:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[: tokens - 1]]), use_cache=False).logits[0, PREFIX - 1 :]
    finally:
        for hook in hooks:
            hook.remove()
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[PREFIX:tokens]), reduction="none")
    assert simulated.nll == pytest.approx(wanted.numpy(), abs=1e-3)
    assert np.abs(simulated.nll - simulated.nll_full).max() > 0.1


def test_simulated_keys_before_rope_are_turned_back_and_on(model, ids):
    """CSKV with random bases is a projection of what k_proj and v_proj give."""
    method, shape = CSKV(keep=0.5), LayerShape(2, 64, torch.float32)
    fitted = {i: bases(shape, 64, 64, mean=0.1, seed=i) for i in range(4)}
    artifact = Artifact(method, fitted, {"identity": identity_of(model).to_dict()})
    simulated = simulate(model, {"x": artifact}, ids[:TOKENS], PREFIX)["x"]

    def project(up: torch.Tensor, mean: torch.Tensor):
        return lambda m, args, out: (out - mean[0]) @ up[0].T @ up[0] + mean[0]

    hooks = []
    for i, layer in enumerate(model.model.layers):
        for module, kv in ((layer.self_attn.k_proj, "key"), (layer.self_attn.v_proj, "value")):
            hooks.append(module.register_forward_hook(project(fitted[i][f"{kv}_up"], fitted[i][f"{kv}_mean"])))
    try:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:TOKENS]]), use_cache=False).logits[0, PREFIX - 1 : -1]
    finally:
        for hook in hooks:
            hook.remove()
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[PREFIX:TOKENS]), reduction="none")
    assert simulated.nll == pytest.approx(wanted.numpy(), abs=1e-3)
    assert np.abs(simulated.nll - simulated.nll_full).max() > 0.1


def test_simulated_is_at_least_as_lossy_as_decoding(model, ids):
    methods = {"channel": LOSSY, "token": RTN(bits=3, key_axis="token")}
    decoded, simulated = (tracks(model, methods, ids[:TOKENS], mode, PREFIX) for mode in ("decode", "simulated"))
    for label in methods:
        assert simulated[label].kl.mean() > decoded[label].kl.mean() > 0


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"mode": "prefix_compressed", "prefix": 0}, TOKENS),  # one forward over everything
        ({"mode": "prefix_compressed", "prefix": 64}, TOKENS),  # 63 tokens filled: window 32, page 32 less one
        ({"mode": "decode", "prefix": 0}, 65),  # the 65th would be the first to read a page
        ({"mode": "chunked", "prefix": 10, "chunk": 80}, 90),
    ],
)
@pytest.mark.parametrize("method", [LOSSLESS, LOSSY, StreamingLLM(window=32)])
def test_scores_of_the_uncompressed_model_are_refused(model, ids, settings, tokens, method):
    with pytest.raises(EvalError, match=r"exact in this cache: one forward pass.*mode='decode'.*at least 65 tokens"):
        perplexity(model, method, ids[:tokens], **settings)


def test_the_remedy_is_enough(model, ids):
    assert perplexity(model, LOSSY, ids[:100], mode="prefix_compressed", prefix=65).exercised == 1
    some = perplexity(model, LOSSY, ids[:80], mode="decode", prefix=0)
    assert 0 < some.exercised < 0.2
    assert f"{100 * some.exercised:.0f} % of them read" in str(some)


def test_a_window_larger_than_the_text_is_refused(model, ids):
    with pytest.raises(EvalError, match=r"at least 633 tokens \(window 600, page 32, sinks 4\)"):
        perplexity(model, RTN(bits=2, window=600), ids[:TOKENS], mode="decode", prefix=PREFIX)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "one_forward"}, "mode 'one_forward' is unknown"),
        ({"mode": "decode", "chunk": 8}, "chunk=8 has no meaning"),
        ({"mode": "simulated", "chunk": 8}, "chunk=8 has no meaning"),
        ({"mode": "chunked", "chunk": 0}, "chunk=0: feed at least 1"),
        ({"mode": "decode", "prefix": 100}, "prefix of 100 in 100 tokens"),
        ({"mode": "decode", "prefix": -1}, "prefix of -1"),
        ({"mode": "decode", "n_bytes": 0}, "n_bytes=0"),
    ],
)
def test_what_makes_no_sense_is_refused(model, ids, settings, reason):
    with pytest.raises(EvalError, match=reason):
        perplexity(model, LOSSY, ids[:100], **{"prefix": 97, **settings})


def test_dropped_tokens_cannot_be_simulated(model, ids):
    with pytest.raises(EvalError, match="StreamingLLM drops tokens"):
        perplexity(model, StreamingLLM(), ids[:TOKENS], mode="simulated", prefix=PREFIX)


def test_two_documents_are_not_one(model, ids):
    with pytest.raises(EvalError, match=r"shape \(2, 50\)"):
        perplexity(model, LOSSY, torch.tensor(ids[:100]).view(2, 50), mode="decode", prefix=0)


# --- the result ---


def test_the_number_never_goes_without_its_mode(reference, ids):
    model, tokenizer = reference
    for mode in MODES:
        size = scored_bytes(tokenizer, ids[:TOKENS], PREFIX)
        x = perplexity(model, LOSSY, ids[:TOKENS], mode=mode, prefix=PREFIX, n_bytes=size)
        chunk = {"decode": 1, "chunked": 32, "prefix_compressed": 60, "simulated": None}[mode]
        assert (x.mode, x.chunk, x.positions) == (mode, chunk, 60)
        assert f"[{mode}" in str(x)
        assert ("no byte saved" in str(x)) == (mode == "simulated")
        assert x.ppl == pytest.approx(exp(x.nll))
        assert x.bits_per_byte == pytest.approx(x.nll * 60 / log(2) / size)
        assert x.to_dict()["mode"] == mode


def test_scored_bytes_are_those_of_the_text(reference):
    _, tokenizer = reference
    text = "Caf\u00e9 \u4e2d\u6587 and some more words"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *plain]
    assert scored_bytes(tokenizer, ids, 0) == scored_bytes(tokenizer, ids, 1) == len(text.encode())
    assert scored_bytes(tokenizer, torch.tensor([ids]), len(ids) - 2) == len(tokenizer.decode(plain[-2:]).encode())
    for prefix in range(1, len(ids)):  # borders inside of characters too
        assert 0 <= len(text.encode()) - scored_bytes(tokenizer, ids, prefix) <= len(text.encode())
