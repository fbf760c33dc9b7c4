"""What stays attends as all did: each step against its definition, and a model against one that only drops."""

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import lsq_linear

import kvshrink
from kvshrink.attach.fill import fill, prefill, wanted_by
from kvshrink.attach.judging import QUERIES, judged_by_reading_again, judged_of
from kvshrink.cache import matching
from kvshrink.cache.matching import bounded_gains, matched
from kvshrink.cache.rope import Rope
from kvshrink.errors import CacheError, SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.methods._evidence import Heard
from kvshrink.methods.evict.attention_matching import AttentionMatching
from kvshrink.methods.evict.kvzip import KVzip
from tests.attach.test_unknown_models import built
from tests.attach.test_wrong_tokens import SINKS
from tests.methods.evicting import SHAPE, cache_of, check_generate, reference, refused
from tests.methods.test_kvzip import kept, logits_of
from tests.scenarios.scenarios import tokens
from tests.tiny import build

M, T, R, D = 300, 60, 8, 16  # queries, keys of the block, keys beside it, channels


def case(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    sizes = {"queries": (M, D), "keys": (T, D), "values": (T, D), "rest_keys": (R, D), "rest_values": (R, D)}
    found = {name: draw.standard_normal(size) for name, size in sizes.items()}
    found["queries"] = found["queries"] * 0.4 + 0.3  # queries have a mean, along which a key can gain with all of them
    return found


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def seen(case, keys, values) -> np.ndarray:
    """What the queries see of a block, and of what is beside it."""
    scores = case["queries"] @ np.concatenate([keys, case["rest_keys"]]).T
    return softmax(scores) @ np.concatenate([values, case["rest_values"]])


def run(case, kept, softcap=None):
    given = {k: torch.from_numpy(x).float() for k, x in case.items()}
    found = matched(given["queries"], given["keys"], given["values"], torch.from_numpy(kept), given["rest_keys"],
                    given["rest_values"], softcap)  # fmt: skip
    return [x.double().numpy() for x in found]


@pytest.mark.parametrize("k", [3, 20, 59])
def test_gains_are_the_best_within_bounds(k):
    """Against scipy's solver of the same squares: weights from 1/e to e, each a little towards 1 in its own unit."""
    draw = np.random.default_rng(k)
    weights = softmax(draw.standard_normal((M, T)) * 2)[:, :k]
    share = np.minimum(1.0, weights.sum(1) * draw.uniform(0.8, 4.0))
    got = np.exp(bounded_gains(torch.from_numpy(weights), torch.from_numpy(share)).numpy())
    unit = np.linalg.norm(weights, axis=0)
    a = np.concatenate([weights / unit, np.sqrt(1e-3) * np.eye(k)])
    aim = np.concatenate([share, np.sqrt(1e-3) * unit])
    low, high = (unit * np.exp(s * matching.BOUND) for s in (-1, 1))
    want = lsq_linear(a, aim, (low, high)).x / unit

    def loss(gains):
        return float(np.square(a @ (gains * unit) - aim).sum())

    assert (got >= np.exp(-matching.BOUND) - 1e-6).all()
    assert (got <= np.exp(matching.BOUND) + 1e-6).all()
    assert loss(got) <= loss(want) * (1 + 1e-3) + 1e-9
    assert loss(want) < 0.9 * loss(np.ones(k))


@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("queries", [M, 12])
def test_values_are_those_of_least_squares(k, queries):
    """Around the values that were there; also where there are fewer queries than keys."""
    given = case() | {"queries": case()["queries"][:queries]}
    own = np.sort(np.random.default_rng(1).choice(T, k, replace=False))
    keys, values = run(given, own)
    scores = given["queries"] @ np.concatenate([keys, given["rest_keys"]]).T
    weights, beside = np.split(softmax(scores), [k], 1)
    wanted = (
        seen(given, given["keys"], given["values"]) - beside @ given["rest_values"] - weights @ given["values"][own]
    )
    share = np.split(softmax(given["queries"] @ np.concatenate([given["keys"], given["rest_keys"]]).T), [T], 1)[0].sum(
        1
    )
    small = matching.RIDGE * max(np.square(weights).sum() / k, np.square(share).sum() / k**2)
    want = np.linalg.solve(weights.T @ weights + small * np.eye(k), weights.T @ wanted)
    np.testing.assert_allclose(values - given["values"][own], want, rtol=1e-2, atol=2e-3)


def test_keys_move_along_one_direction_in_which_queries_are_alike():
    given, own = case(), np.arange(0, T, 3)
    moved = run(given, own)[0] - given["keys"][own]
    _, size, rows = np.linalg.svd(moved)
    assert size[1] < 1e-4 * size[0]
    along = given["queries"] @ (rows[0] * np.sign((given["queries"] @ rows[0]).mean()))
    assert along.mean() > 2 * along.std(), "of any direction, most have a mean of about 0"
    assert (np.abs(moved @ rows[0]) > 1e-3).any()


@pytest.mark.parametrize("k", [6, 15, 30])
def test_it_attends_nearer_to_all_than_what_only_stays(k):
    given = case(k)
    own = np.sort(np.argsort(-softmax(given["queries"] @ given["keys"].T).max(0))[:k])
    want = seen(given, given["keys"], given["values"])
    only = np.square(seen(given, given["keys"][own], given["values"][own]) - want).sum()
    assert np.square(seen(given, *run(given, own)) - want).sum() < 0.5 * only
    capped = run(given, own, softcap=2.0)
    assert np.abs(capped[1] - run(given, own)[1]).max() > 1e-3


def test_values_are_bounded_where_queries_hardly_read_what_stays():
    """As in a short second prompt: they read a token that goes, and what stays gets next to nothing."""
    given = case()
    own = np.array([3, 9])
    given["keys"][own] -= 20 * given["queries"].mean(0) / np.square(given["queries"].mean(0)).sum()
    values = run(given, own)[1]
    assert 0.1 < np.abs(values - given["values"][own]).max() < 2, "without that bound 40"


@pytest.mark.parametrize("reach", [100, 300])
def test_queries_are_turned_to_where_the_next_tokens_stand(reach):
    """Behind each row's last token, whatever frequencies their own step had."""
    draw = torch.Generator().manual_seed(0)
    rope = Rope(torch.rand(4, generator=draw), 1.0, False, torch.rand(4, generator=draw) / 4, 200)
    raw, read = torch.randn(2, 1, 300, 8, generator=draw), 50 + torch.arange(300).expand(2, -1) % 40
    last = torch.tensor([49, 20])
    marked = rope.of_prompt(read, torch.full_like(read, reach))
    assert bool((marked > 1000).all()) == (reach > 200)
    at = last[:, None] + 1 + torch.arange(300) % 128
    got = matching.behind(rope.apply(raw, marked), marked, last, rope)
    torch.testing.assert_close(got, rope.apply(raw, at), rtol=1e-3, atol=1e-3)


def test_a_logit_of_no_token_takes_its_share():
    """As one more key beside the block has it, whose value is 0 and whose scores these are."""
    given, own = {k: torch.from_numpy(x).float() for k, x in case().items()}, torch.arange(0, T, 4)
    block = [given[k] for k in ("queries", "keys", "values")]
    key = 2 * torch.randn(1, D)
    beside = torch.cat([given["rest_keys"], key]), torch.cat([given["rest_values"], torch.zeros(1, D)])
    want = matched(*block, own, *beside)
    got = matched(*block, own, given["rest_keys"], given["rest_values"], None, given["queries"] @ key.T)
    without = matched(*block, own, given["rest_keys"], given["rest_values"])
    for a, b, c in zip(got, want, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert (a - c).abs().max() > 0.01


def test_sinks_as_logits_are_heard():
    """gpt-oss: importance, and what each query that is kept has as its logit, against the model's own weights."""
    model = built("GptOssForCausalLM", transformers.GptOssConfig(**SINKS))
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.copy_(torch.randn_like(weight) * 2)
    ids = tokens(1, 40)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        found = model(torch.cat([ids, ids], 1), output_attentions=True).attentions
    kvshrink.attach(model)
    got = judged_by_reading_again(model, prefill(model, ids), ids, queries=True)
    for layer, weights in enumerate(found):
        own = got[layer]
        h = own.scores.shape[1]
        want = weights[0, :, 40:, :40].unflatten(0, (h, -1)).amax((1, 2))
        torch.testing.assert_close(own.scores[0], want, rtol=1e-3, atol=1e-4)
        sinks = model.model.layers[layer].self_attn.sinks.view(h, -1)
        torch.testing.assert_close(own.sinks[0], sinks[:, torch.arange(QUERIES) % sinks.shape[1]])
    cache = kvshrink.make_cache(model, AttentionMatching(ratio=0.3, window=8, sinks=2))
    assert torch.isfinite(model(tokens(1, 150), past_key_values=cache).logits).all()
    assert torch.isfinite(model(tokens(1, 3), past_key_values=cache).logits).all()


# --- in a cache ---


def heard(tokens: int, m: int = 64) -> dict[int, Heard]:
    at = tokens + torch.arange(m).expand(2, -1)
    return {0: Heard(torch.rand(2, 2, tokens), torch.randn(2, 2, m, 8), at, torch.full_like(at, tokens + m))}


def give(cache, keys, values, judged, real=None) -> None:
    b, _, s, _ = keys.shape
    at = cache.get_seq_length() + torch.arange(s, dtype=torch.int32).expand(b, -1)
    cache.judged = None if judged is None else judged_of(cache, judged, real)
    cache.stage(0, at, real, None, True, "model")
    cache.update(keys, values, 0)
    cache.judged = None


@pytest.mark.parametrize("pads", [0, 45])
def test_a_cache_holds_what_the_definition_gives(pads):
    """Sinks and window are beside the block, pads are nothing; what is held is matched, and takes no byte more."""
    keys, values, judged = torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 8), heard(300)
    real = torch.arange(300).expand(2, -1) >= torch.tensor([[pads], [0]])
    caches = [cache_of(kind(ratio=0.25, per="even"), [{}]) for kind in (AttentionMatching, KVzip)]
    for cache in caches:
        give(cache, keys, values, judged, real if pads else None)
    assert kept(caches[0]) == kept(caches[1])
    assert caches[0].nbytes == caches[1].nbytes
    layer, pages = caches[0].compressed[0], caches[0].compressed[0].body.youngest
    rows = [c.decode(pages.records().under(f"{s}."), 2) for s, c in zip("kv", layer.codecs, strict=True)]
    for row, head in np.ndindex(2, 2):
        first = (pads, 0)[row]
        block, rest = slice(first + 4, 256), [*range(first, first + 4), *range(256, 300)]
        there = pages.slots[row, head] >= 0
        own = pages.slots[row, head][there].long()
        given = (judged[0].queries[row, head], keys[row, head, block], values[row, head, block], own - first - 4)
        want = matched(*given, keys[row, head, rest], values[row, head, rest])
        for got, x in zip(rows, want, strict=True):
            torch.testing.assert_close(got[row, head][there], x, rtol=1e-3, atol=1e-3)


def test_only_a_first_prompt_is_matched():
    method = AttentionMatching(ratio=0.25, per="even")
    cache = cache_of(method, [{}])
    values = torch.randn(2, 2, 600, 8)
    give(cache, torch.randn(2, 2, 300, 8), values[:, :, :300], heard(300))
    give(cache, torch.randn(2, 2, 300, 8), values[:, :, 300:], heard(300))
    pages = cache.compressed[0].body.youngest
    rows = cache.compressed[0].codecs[1].decode(pages.records().under("v."), 2)
    changed = {True: 0, False: 0}
    for row, head in np.ndindex(2, 2):
        for slot, column in enumerate(pages.slots[row, head].tolist()):
            if column >= 0:
                same = torch.equal(rows[row, head, slot], values[row, head, column])
                changed[column < 256] += not same
                assert same or column < 256, "of the first, as far as it left the window then"
    assert changed[True] > 200


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "cohere2"])
def test_rows_that_a_sliding_window_holds_whole_beside_rows_that_it_does_not(name):
    model = build("text", name)
    kvshrink.attach(model)
    ids, mask = torch.randint(3, 100, (2, 220)), torch.ones(2, 220, dtype=torch.long)
    mask[1, :195] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = kvshrink.make_cache(model, AttentionMatching(ratio=0.3))
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert torch.isfinite(out.logits[0]).all()
    assert cache.report().byte_ratio < 1
    found = judged_by_reading_again(model, prefill(model, ids, mask), ids, mask, queries=True)
    cap = getattr(model.config, "attn_logit_softcapping", None)
    assert all(x.softcap == cap for x in found.values() if x.queries is not None)


def test_a_model_of_learned_positions_has_room_or_says_so():
    model = build("text", "gpt2")
    kvshrink.attach(model)
    most = model.config.max_position_embeddings
    with pytest.raises(CacheError, match="read again up to position"):
        model(
            torch.randint(3, 90, (1, most // 2 + 40)), past_key_values=kvshrink.make_cache(model, AttentionMatching())
        )


def test_what_is_decoded_is_as_it_was_and_nothing_moves_without_queries():
    keys, values = torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 8)
    cache = cache_of(AttentionMatching(ratio=0.25, per="even"), [{}])
    give(cache, keys, values, {0: Heard(torch.rand(2, 2, 300))})
    for _ in range(70):
        give(cache, torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), None)
    pages = cache.compressed[0].body.youngest
    rows = cache.compressed[0].codecs[1].decode(pages.records().under("v."), 2)
    for row, head in np.ndindex(2, 2):
        for slot, column in enumerate(pages.slots[row, head].tolist()):
            if column >= 0:
                want = values[row, head, column] if column < 300 else torch.ones(8)
                torch.testing.assert_close(rows[row, head, slot], want)


def test_queries_are_those_that_read_again():
    model, _, rows = reference()
    kvshrink.attach(model)
    ids = rows[:1, :90]
    dense = prefill(model, ids)
    found = judged_by_reading_again(model, dense, ids, queries=True)
    exact = kvshrink.reference_model("float32")[0].double()
    scores = logits_of(exact, torch.cat([ids[0], ids[0]]))
    for layer in range(4):
        own = found[layer]
        assert own.queries.shape == (1, 2, QUERIES, 64)
        assert set(own.positions[0].tolist()) == set(range(90, 180))
        at = own.positions[0].numpy()
        members = np.arange(QUERIES) % 2
        for head in range(2):
            got = own.queries[0, head].double() @ dense.layers[layer].keys[0, head].double().T
            want = scores[layer][2 * head + members, at][:, :90]
            np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_filled_cache_holds_what_the_model_s_own_prompt_leaves():
    model, _, rows = reference()
    method = AttentionMatching(ratio=0.3, per="even")
    ids, mask = rows[:, :300], torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    own, filled = (kvshrink.make_cache(model, method) for _ in range(2))
    model(input_ids=ids, attention_mask=mask, past_key_values=own)
    fill(filled, prefill(model, ids, mask, wanted_by([method])), kvshrink.attach(model), mask)
    for layers in zip(own.compressed, filled.compressed, strict=True):
        held = [x.codecs[1].decode(x.body.youngest.records().under("v."), 2) for x in layers]
        torch.testing.assert_close(*held, rtol=2e-2, atol=2e-2)


def test_a_model_answers():
    check_generate(AttentionMatching(ratio=0.28), 0.6)


def test_settings():
    refused(AttentionMatching, {"merge": True}, {"schedule": "page"}, {"ratio": 0}, {"per": "token"})
    with pytest.raises(SettingError, match="count twice"):
        parse("attention_matching + turboquant:bits=4,demote=True")
    assert AttentionMatching().policy(SHAPE, {}).matches
