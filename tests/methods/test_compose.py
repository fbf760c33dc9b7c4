import contextlib

import numpy as np
import pytest
import torch

import kvshrink
from kvshrink import CSKV, RTN, methods
from kvshrink.cache import attend
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.methods.evict.compose import Compose, compose
from kvshrink.methods.evict.duo_attention import DuoAttention
from kvshrink.methods.evict.h2o import H2O
from kvshrink.methods.evict.knorm import KNorm
from kvshrink.methods.evict.snapkv import SnapKV
from kvshrink.methods.evict.tova import TOVA
from kvshrink.methods.text import parse_settings, text_of
from tests.cache.build import bases
from tests.methods.evicting import (
    ADDED,
    MEMBERS,
    NEWEST_FIRST,
    SHAPE,
    Rule,
    Steps,
    check_generate,
    fitted_to_reference,
    pooled,
    reference,
)

SMALL = Rule(lambda seen: -np.linalg.norm(seen.keys, axis=-1), None, keeps="own")
NEWEST = Rule(lambda seen: seen.mass, lambda n: [n - 1], keeps="latest")
LATENT = bases(SHAPE, 8, 8)  # half of the channels

TEXTS = {
    "snapkv:ratio=0.25 + cskv:keep=0.2,bits=4": (SnapKV(ratio=0.25), CSKV(keep=0.2, bits=4)),
    "snapkv + cskv:keep=0.3 + turboquant:bits=2": (SnapKV(), CSKV(keep=0.3, codec="turboquant", bits=2)),
    "kvzip:ratio=0.3 + turboquant:bits=4": (methods.get("kvzip")(ratio=0.3), methods.get("turboquant")(bits=4)),
    "h2o:ratio=0.5,schedule=page,window=40 + rtn:key_axis=token,sinks=8": (H2O(ratio=0.5), RTN(key_axis="token")),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_names_both_and_comes_back(text):
    entry, (chooser, store) = parse(text), TEXTS[text]
    method = entry.method
    assert entry.label == text
    ours = {"window": method.window, "sinks": method.sinks}
    assert method.chooser == type(chooser)(**chooser.settings() | ours | {"schedule": method.schedule})
    assert method.storage == type(store)(**store.settings() | ours)
    name, _, settings = text_of(method).partition(":")
    assert methods.build(name, parse_settings(settings)) == method
    if "window" in text:
        assert (method.window, method.sinks, method.schedule) == (40, 8, "page")
    else:
        assert (method.window, method.sinks, method.schedule) == (32, 4, "prompt")


def test_objects_say_the_same_as_text():
    assert compose(SnapKV(ratio=0.3), CSKV(keep=0.3, bits=4)) == parse("snapkv:ratio=0.3 + cskv:keep=0.3,bits=4").method
    longer = compose(KNorm(schedule=40), RTN(window=64, sinks=0, key_axis="token"))
    assert (longer.window, longer.sinks, longer.schedule, longer.chooser.schedule) == (64, 0, 40, 40)


def test_a_pyramid_s_layers_have_shares_of_their_own():
    method = parse("pyramidkv:ratio=0.3,steepness=4 + turboquant:bits=4").method
    assert [method.at_layer(i, 3).chooser.ratio for i in range(3)] == pytest.approx([0.525, 0.3, 0.075])
    assert [method.at_layer(i, 3).storage for i in range(3)] == [method.storage] * 3


# --- which tokens stay ---

CHOICES = {
    "knorm": (KNorm(ratio=0.3), SMALL),
    "snapkv": (SnapKV(ratio=0.3), pooled()),
    "h2o": (H2O(ratio=0.3), ADDED),
    "tova": (TOVA(ratio=0.3), NEWEST),
}
STORES = {
    "turboquant:bits=4": {},
    "rtn:bits=4,key_axis=token": {},
    "kivi:bits=4": {},
    "cskv:keep=0.5": LATENT,
    "cskv:keep=0.5,bits=4": LATENT,
    "cskv:keep=0.5,codec=turboquant,bits=4": LATENT,
}


def steps_of(tokens: str, store: str, pads: int = 37, **settings) -> Steps:
    chooser, rule = CHOICES[tokens]
    whole = Compose(tokens=text_of(chooser), store=store, **settings)
    # scales of their keys are over several tokens; where they are demoted those chosen are held by themselves
    moves = store not in ("kivi:bits=4", "cskv:keep=0.5,bits=4") or whole.demote
    return Steps(whole.chooser, pads=pads, rule=rule, whole=whole, fitted=STORES[store], moves=moves)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("tokens", CHOICES)
def test_the_chooser_s_own_tokens_stay_whatever_stores_them(tokens, store):
    """Chosen while exact; later tokens are ranked beside what is stored. Heads that share a latent share the choice."""
    steps = steps_of(tokens, store)
    assert steps.lanes == (1 if "cskv" in store or tokens == "tova" else 2)
    steps.run(400, *[1] * 40, 90)


@pytest.mark.parametrize("schedule", ["page", 40])
@pytest.mark.parametrize("store", ["turboquant:bits=4", "rtn:bits=4,key_axis=token", "cskv:keep=0.5"])
def test_stored_tokens_go_where_they_can_move(store, schedule):
    steps = steps_of("knorm", store, schedule=schedule).run(300)
    before = dict(decoded(steps))
    steps.run(*[1] * 100)
    after = decoded(steps)
    assert before.keys() - after.keys(), "some make room"
    assert before.keys() & after.keys()
    for at in before.keys() & after.keys():
        assert np.array_equal(before[at], after[at]), "bit for bit"


def decoded(steps: Steps) -> dict[tuple[int, int, int], np.ndarray]:
    """Key and value that each token comes back as, by row, head and column."""
    slots, (keys, values) = steps.stored()
    return {
        (row, head, int(slots[row, head, i])): np.concatenate([keys[row, head, i], values[row, head, i]])
        for row, head, i in zip(*np.nonzero(slots >= 0), strict=True)
    }


@pytest.mark.parametrize("store", STORES)
def test_stored_rows_are_just_the_tokens_that_stay_encoded(store):
    """In pages of 32 of them, in order."""
    steps = steps_of("snapkv", store, pads=0).run(500)
    codecs, (slots, stored) = steps.cache.compressed[0].codecs, steps.stored()
    for row in range(2):
        columns = np.stack([own[own >= 0] for own in slots[row]])
        assert columns.shape == (2, 5 * 32)
        for codec, rows, got in zip(codecs, (steps.keys, steps.values), stored, strict=True):
            exact = np.stack([rows[row, head, columns[head]] for head in range(2)])
            encoded = codec.encode(torch.from_numpy(exact).float()[None], None)
            np.testing.assert_allclose(codec.decode(encoded, 2)[0], got[row], atol=1e-5)


@pytest.mark.parametrize("store", STORES)
def test_a_token_that_is_not_chosen_is_demoted(store):
    """Those chosen are held as they are, and make room for others; all are in the store, and ranked as they are read
    there."""
    for tokens in CHOICES:
        steps = steps_of(tokens, store, demote=True)
        steps.run(400, *[1] * 40, 90)
        chosen, every = (age.pages for age in steps.cache.compressed[0].body.ages)
        left = steps.left(530)
        assert every.slots.shape == (2, 1, left)
        assert int(chosen.tokens.max()) == -(-left // 32 * 3 // 10) * 32
        slots, stored = steps.stored()
        row, head, at = np.nonzero(slots >= 0)
        for got, exact in zip(stored, (steps.keys, steps.values), strict=True):
            assert np.array_equal(got[row, head, at], exact[row, head, slots[row, head, at]])


def test_nothing_is_merged_where_nothing_is_dropped():
    """What is read from the store must not count in the value of another token too."""
    with contextlib.suppress(SettingError):
        method = Compose(tokens="knorm:ratio=0.3,merge=True", store="turboquant:bits=4", demote=True)
        steps = Steps(KNorm(ratio=0.3, schedule="prompt"), rule=SMALL, whole=method).run(400)
        slots, (_, values) = steps.stored()
        row, head, at = np.nonzero(slots >= 0)
        assert np.array_equal(values[row, head, at], steps.values[row, head, slots[row, head, at]])


@pytest.mark.parametrize("demote", [False, True])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("reference", ["0", "1"])
def test_attention_is_over_what_is_stored(store, demote, reference, monkeypatch):
    """Of the kept tokens, or of all: each once. By the fused kernel, and block by block."""
    monkeypatch.setenv("KVSHRINK_REFERENCE", reference)
    steps = steps_of("snapkv", store, demote=demote)
    steps.step(400)
    steps.step(50)
    query, keys, values = steps.step(1)
    mask = torch.from_numpy(np.stack([steps.real(row) for row in range(2)]))[:, None, None]
    got = attend.attend(query, keys, values, mask, 8**-0.5, None, keys._kvshrink)
    rows = steps.read()
    for row, head in np.ndindex(2, 2):
        k, v = (x[row, head, steps.dense(row, head)] for x in rows)
        for member in range(MEMBERS):
            q = query[row, head * MEMBERS + member, 0].double().numpy() * 8**-0.5
            weights = np.exp(k @ q - (k @ q).max())
            found = got[row, head * MEMBERS + member, 0].numpy()
            np.testing.assert_allclose(found, weights @ v / weights.sum(), atol=2e-3)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_held_bytes_are_those_promised_and_shares_multiply(store, ratio):
    more = Compose(tokens="snapkv", store=store, ratio=ratio, demote=True)
    steps = Steps(more.chooser, rule=pooled(), whole=more, fitted=STORES[store])
    steps.step(1000)
    assert steps.cache.compressed[0].held().total == more.layer_bytes(SHAPE, STORES[store], 1000, 2)
    method = Compose(tokens="snapkv", store=store, ratio=ratio)
    steps = Steps(method.chooser, rule=pooled(), whole=method, fitted=STORES[store])
    steps.step(1000)
    held = steps.cache.compressed[0].held()
    assert held.total == method.layer_bytes(SHAPE, STORES[store], 1000, 2)
    pages = -(-30 * ratio // 1)
    body = 2 * pages * 32 * method.storage.bits_per_token(SHAPE, STORES[store]) / 8
    assert held.payload + held.metadata == pytest.approx(body, rel=0.2), "but for what aligns records"


@pytest.mark.parametrize("whole", [[1, 0], [0, 0]])
def test_heads_of_two_classes_are_stored_by_a_store_of_heads(whole):
    method = Compose(tokens="duo_attention:recent=64", store="turboquant:bits=4")
    fitted = {"tokens.whole": torch.tensor(whole, dtype=torch.uint8)}
    chooser = DuoAttention(recent=64, sinks=4, schedule="prompt")

    def counts(row: int, candidates: list, pages: int) -> list[int]:
        return [pages * 32 if full else 32 for full in whole]

    steps = Steps(chooser, pads=9, rule=NEWEST_FIRST, counts=counts, whole=method, fitted=fitted).run(300, 1, 80)
    held = steps.cache.compressed[0].held()
    assert held.payload + held.metadata == 2 * method.body_bytes(SHAPE, fitted, steps.left(381) // 32)


@pytest.mark.parametrize("settings", [{}, {"most": 150}, {"protect": 200}, {"floor": 0.0}], ids=str)
def test_settings_count_tokens_where_a_store_has_pages_of_128(settings):
    chooser = KNorm(ratio=0.3, **settings)
    method = Compose(tokens=text_of(chooser), store="kvarn")
    steps = Steps(method.chooser, rule=SMALL, whole=method, moves=False)
    assert steps.page == 128
    steps.run(1300, 200)
    steps = Steps(method.chooser, rule=SMALL, whole=method, moves=False)
    steps.step(1300)
    assert steps.cache.compressed[0].held().total == method.layer_bytes(SHAPE, {}, 1300, 2)


def test_where_a_store_has_pages_of_128_tokens_are_demoted_or_that_is_refused():
    with contextlib.suppress(SettingError):
        method = Compose(tokens=text_of(KNorm(ratio=0.3)), store="kvarn", demote=True)
        steps = Steps(method.chooser, rule=SMALL, whole=method).run(1300, 200)
        assert steps.cache.compressed[0].body.ages[1].pages.slots.shape == (2, 1, 1408)


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rtn + snapkv", "chooses tokens"),
        ("streaming_llm + rtn", "chooses tokens"),
        ("snapkv + h2o", "stores each token"),
        ("snapkv + zipcache", "stores each token"),
        ("h2o + xquant_cl", "stores each token"),
        ("snapkv:window=64 + rtn:window=32", "Give it once"),
        ("snapkv + cskv + turboquant:bits=2,seed=1", "bits=... alone"),
        ("snapkv + cskv + turboquant + rtn", "tokens . store"),
        ("snapkv:ratio=2 + rtn", "ratio=2"),
        ("kvzip:schedule=page + turboquant", "schedule"),
        ("snapkv + ", "tokens . store|no method"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text, why):
    with pytest.raises(SettingError, match=rf"\A(?=.*(?:{why}))[^\n]+\Z"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "fitted", "why"),
    [
        ("snapkv:schedule=page + kivi:bits=4", {}, "Use schedule='prompt'"),
        ("snapkv:schedule=64 + rtn:bits=4", {}, "Use schedule='prompt'"),
        ("snapkv:schedule=page + cskv:keep=0.5,bits=4", LATENT, "Use schedule='prompt'"),
        ("duo_attention + cskv:keep=0.5", LATENT | {"tokens.whole": torch.tensor([1, 0])}, "Use turboquant or rtn"),
        ("moa + cskv:keep=0.5", LATENT | {"tokens.spans": torch.tensor([[64, 0], [0, 1]])}, "Use turboquant or rtn"),
    ],
)
def test_what_a_cache_cannot_do_is_refused_in_one_line(text, fitted, why):
    method = parse(text).method
    with pytest.raises(SettingError, match=rf"\A(?=.*(?:{why}))[^\n]+\Z"):
        method.lanes(SHAPE, method.tiers(SHAPE, fitted))
    if not fitted:
        with pytest.raises(SettingError, match=why):
            kvshrink.make_cache(reference()[0], method)


# --- with a model ---


@pytest.mark.parametrize("text", ["snapkv:ratio=0.28 + turboquant:bits=4", "kvzip:ratio=0.28 + rtn:bits=8"])
def test_a_model_answers(text):
    check_generate(parse(text).method, 0.4)


@pytest.mark.parametrize(
    "text", ["snapkv:ratio=0.28 + cskv:keep=0.5,bits=4", "kvzap:ratio=0.28 + cskv:keep=0.5 + turboquant:bits=4"]
)
def test_both_are_fitted_and_a_model_answers(text):
    artifact = fitted_to_reference(parse(text).method)
    names = {name for name in artifact.layers[0] if name.startswith("tokens.")}
    assert names == ({"tokens.weight", "tokens.bias", "tokens.least"} if "kvzap" in text else set())
    assert ("agreement" in artifact.provenance) == ("kvzap" in text)
    check_generate(artifact, 0.5)
