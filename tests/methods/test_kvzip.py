import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvshrink
from kvshrink.attach import judging
from kvshrink.attach.fill import fill, prefill, wanted_by
from kvshrink.attach.judging import judged_by_reading_again, judged_of
from kvshrink.errors import CacheError
from kvshrink.methods._evidence import Heard
from kvshrink.methods.evict.kvzip import KVzip
from tests.methods.evicting import SHAPE, cache_of, check_generate, pages_of, reference, refused, wanted

LAYERS, S = 3, 420


# --- what a model needs, by its own account ---


@pytest.fixture(scope="module")
def eager():
    """The model again, in float64 and without our attention."""
    return kvshrink.reference_model("float32")[0].double()


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> list[np.ndarray]:
    """Scores of all queries and keys of each layer [4, n, n], from its own projections and RoPE."""
    inputs, found = [], []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda module, args, out: inputs.append(out))
        for layer in model.model.layers
    ]
    model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    turns = model.model.rotary_emb(inputs[0], torch.arange(len(ids))[None])
    for layer, hidden in zip(model.model.layers, inputs, strict=True):
        own = [
            p(hidden).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        ]
        q, k = apply_rotary_pos_emb(*own, *turns)
        found.append((q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8)[0].numpy())
    return found


def by_reading_again(model, ids: torch.Tensor, chunk: int) -> np.ndarray:
    """Of a prompt [n] the most attention that each token gets, [layers, heads, n]: softmax over the first 4 tokens, the
    chunk and its repetition, which begins 8 tokens before the chunk and stands behind the prompt."""
    n, found = len(ids), np.zeros((4, 2, len(ids)))
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        again = torch.cat([ids, ids[max(0, start - 8) : stop]])
        columns = [*range(min(4, start)), *range(start, stop), *range(n, len(again))]
        for layer, scores in enumerate(logits_of(model, again)):
            for x in range(n, len(again)):
                seen = [c for c in columns if c <= x]
                weights = np.exp(scores[:, x, seen] - scores[:, x, seen].max(-1, keepdims=True))
                weights = weights / weights.sum(-1, keepdims=True)
                own = weights[:, min(4, start) : min(4, start) + stop - start].reshape(2, 2, -1).max(1)
                found[layer, :, start:stop] = np.maximum(found[layer, :, start:stop], own)
    return found


@pytest.mark.parametrize(("chunk", "alive"), [(2048, 2**22), (48, 2**22), (48, 1), (3, 1)])
def test_scores_are_the_most_attention_of_any_query_that_repeats(chunk, alive, eager, monkeypatch):
    monkeypatch.setattr(judging, "CHUNK", chunk)
    monkeypatch.setattr(judging, "SCORE_ELEMENTS", alive)
    model, _, rows = reference()
    n = 20 if chunk == 3 else 100
    ids = rows[:1, :n]
    kvshrink.attach(model)
    got = judged_by_reading_again(model, prefill(model, ids), ids)
    want = by_reading_again(eager, ids[0], chunk)
    for layer in range(4):
        np.testing.assert_allclose(got[layer].scores[0], want[layer], atol=2e-5)


def test_a_padded_row_is_judged_as_by_itself(eager):
    model, _, rows = reference()
    ids, mask = rows[:, :90], torch.ones(2, 90, dtype=torch.long)
    mask[1, :33] = 0
    kvshrink.attach(model)
    got = judged_by_reading_again(model, prefill(model, ids, mask), ids, mask)
    for row in range(2):
        want = by_reading_again(eager, ids[row, mask[row].bool()], 2048)
        for layer in range(4):
            np.testing.assert_allclose(got[layer].scores[row, :, mask[row].bool()], want[layer], atol=2e-5)
            assert (got[layer].scores[row, :, ~mask[row].bool()] == 0).all()


def test_a_model_s_own_prompt_is_ranked_by_these_scores(eager):
    """Less a number of each head's own, by which heads and layers are told apart."""
    model, _, rows = reference()
    cache = kvshrink.make_cache(model, KVzip(ratio=0.3))
    model(input_ids=rows[:1, :300], past_key_values=cache)
    want = by_reading_again(eager, rows[0, :300], 2048)
    for layer, own in enumerate(cache.compressed):
        pages = own.body.youngest
        for head in range(2):
            there = pages.columns[0, head] >= 0
            columns = pages.columns[0, head, there].numpy()
            less = want[layer, head, columns] - pages.importance[0, head, there].numpy()
            assert len(columns) == 0 or np.ptp(less) < 1e-4


def test_a_cache_that_is_filled_holds_what_the_model_s_own_prompt_leaves():
    model, _, rows = reference()
    ids, mask = rows[:, :300], torch.ones(2, 300, dtype=torch.long)
    mask[1, :32] = 0
    own, filled = (kvshrink.make_cache(model, KVzip(ratio=0.3)) for _ in range(2))
    model(input_ids=ids, attention_mask=mask, past_key_values=own)
    fill(filled, prefill(model, ids, mask, wanted_by([KVzip()])), kvshrink.attach(model), mask)
    assert kept(own) == kept(filled)


def test_ids_are_needed():
    model, _, rows = reference()
    embedded = model.get_input_embeddings()(rows[:1, :200])
    cache = kvshrink.make_cache(model, KVzip())
    with pytest.raises(CacheError, match="pass input_ids"):
        model(inputs_embeds=embedded, past_key_values=cache)


# --- whose tokens compete ---


def read(cache, tokens: int, judged: dict | None, real: torch.Tensor | None = None) -> None:
    """A step of random tokens in all layers."""
    seen = cache.get_seq_length()
    b = 2
    positions = torch.arange(seen, seen + tokens, dtype=torch.int32).expand(b, -1)
    cache.judged = None if judged is None else judged_of(cache, {i: Heard(x) for i, x in judged.items()}, real)
    for i in range(len(cache.layers)):
        cache.stage(i, positions, real, None, True, "model")
        cache.update(*torch.randn(2, b, 2, tokens, 8), i)
    cache.judged = None


def scores(tokens: int) -> dict[int, torch.Tensor]:
    """Layers and heads that need very different numbers of tokens."""
    size = torch.tensor([[0.2, 1.0], [3.0, 0.5], [1.0, 1.5]])
    return {i: torch.rand(2, 2, tokens) ** 3 * size[i, :, None] for i in range(LAYERS)}


def kept(cache) -> list[list[list[set[int]]]]:
    """Columns by row, layer and head."""
    slots = [layer.body.youngest.slots for layer in cache.compressed]
    rows = range(len(slots[0]))
    return [[[{c for c in own if c >= 0} for own in s[row].tolist()] for s in slots] for row in rows]


def best(table: np.ndarray, counts) -> list[list[set[int]]]:
    """The most important columns of each head, [layers * heads, columns], by layer and head."""
    found = []
    for own, count in zip(table, counts, strict=True):
        order = sorted((c for c in range(len(own)) if own[c] > -np.inf), key=lambda c, own=own: (-own[c], c))
        found.append(set(order[: int(count)]))
    return [found[i : i + 2] for i in range(0, len(found), 2)]


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("per", ["model", "layer", "head", "even"])
def test_the_best_tokens_stay_of_those_that_compete(per, ratio, pads):
    cache, judged = cache_of(KVzip(ratio=ratio, per=per), [{}] * LAYERS), scores(S)
    real = torch.arange(S).expand(2, -1) >= torch.tensor([[pads], [0]])
    read(cache, S, judged, real if pads else None)
    pages = (S - 32) // 32
    even = pages_of(pages, ratio) * 32
    for row, first in enumerate((pads + 4, 4)):
        table = np.concatenate([judged[i][row].double().numpy() for i in range(LAYERS)])[:, : pages * 32]
        table[:, :first] = -np.inf  # pads and sinks
        if per == "even":
            counts = [even] * 6
        elif per == "head":
            full = max(1, round(6 * even / (pages * 32)))
            order = sorted(range(6), key=lambda h, x=table: (-x[h].max(), h))
            counts = [pages * 32 if h in order[:full] else 0 for h in range(6)]
        elif per == "model":
            counts = wanted(table, ratio, 0.0, 32) * 32
        else:
            counts = np.concatenate([wanted(part, ratio, 0.0, 32) * 32 for part in np.split(table, LAYERS)])
        assert kept(cache)[row] == best(table, counts)
        assert sum(counts) == 6 * even or per == "head"


@pytest.mark.parametrize("per", ["model", "layer"])
def test_bytes_of_all_layers_are_those_promised(per):
    method = KVzip(ratio=0.3, per=per)
    cache = cache_of(method, [{}] * LAYERS)
    read(cache, S, scores(S))
    held = [layer.held().payload for layer in cache.compressed]
    assert sum(held) == LAYERS * 2 * method.body_bytes(SHAPE, {}, (S - 32) // 32)
    assert (len(set(held)) > 1) == (per == "model")


@pytest.mark.parametrize("per", ["model", "layer", "head", "even"])
def test_what_is_decoded_stays_and_the_next_prompt_is_judged_by_itself(per):
    cache = cache_of(KVzip(ratio=0.3, per=per), [{}] * LAYERS)
    read(cache, 300, scores(300))
    before = kept(cache)
    for _ in range(70):
        read(cache, 1, None)
    after = kept(cache)
    assert all(
        own - old == set(range(256, 320)) and old <= own
        for rows in zip(before, after, strict=True)
        for layers in zip(*rows, strict=True)
        for old, own in zip(*layers, strict=True)
    ), "the window's own tokens, and those decoded"
    read(cache, 200, scores(200))
    for row in kept(cache):
        for layer in row:
            for own in layer:
                assert set(range(300, 370)) <= own, "no prompt says whether they are needed"
        new = sum(len([c for c in own if c >= 370]) for layer in row for own in layer)
        least = 6 * pages_of((570 - 32) // 32 - 370 // 32, 0.3) * 32
        assert new == pytest.approx(least, abs=6 * 16) or per in ("head", "even")


def test_a_short_prompt_is_not_read_again():
    model, _, rows = reference()
    cache, calls = kvshrink.make_cache(model, KVzip()), []
    hook = model.model.register_forward_pre_hook(lambda *a: calls.append(1))
    for tokens, count in (
        (60, 1),
        (1, 2),
        (200, 5),
    ):  # a full prefill, one chunk of the repetition, and the step itself
        model(input_ids=rows[:1, :tokens], past_key_values=cache)
        assert len(calls) == count
    hook.remove()


@pytest.mark.parametrize("per", ["model", "head"])
def test_a_model_answers(per):
    check_generate(KVzip(ratio=0.28, per=per), 0.6)


def test_settings():
    refused(KVzip, {"per": "token"}, {"schedule": "page"}, {"schedule": 5}, {"most": 64}, {"floor": 0.2}, {"ratio": 0})
    refused(KVzip, {"visual_ratio": 0.5}, {"bits": 3})
