"""Saved caches: whatever is changed in one is seen, or is of a kind that no cache has, or at least does no harm."""

import json
from types import SimpleNamespace

import pytest
import torch

import kvshrink
from kvshrink.cache import state as states
from kvshrink.errors import ArtifactError
from kvshrink.methods import build
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.rtn import RTN
from kvshrink.methods.quant.saq import SAQ
from kvshrink.store.digest import digest
from tests.cache.build import feed, make
from tests.scenarios.families import FAMILIES, VOCAB

SHAPE = LayerShape(2, 16, torch.float32)


def filled(method=None, tokens: int = 200, layers: int = 2):
    method = method or RTN(bits=4)
    cache = make(method, SHAPE, [{}] * layers)
    rows = [torch.randn(2, 2, tokens, 16) for _ in range(layers)]
    feed(cache, rows, rows)
    return cache


def new(cache):
    return make(cache.method, SHAPE, [{}] * len(cache.layers))


def edited(state: dict, change, rightly: bool = True) -> dict:
    """The state after a change to its plain values and tensors, with a digest that fits or not."""
    plain = json.loads(bytes(state["plain"].tolist()))
    tensors = {k: t.clone() for k, t in state.items() if k != "plain"}
    sha256 = plain.pop("sha256")
    change(plain, tensors)
    plain["sha256"] = digest(plain, tensors) if rightly else sha256
    return tensors | {"plain": torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("rightly", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda p, t: p["layers"][0].update(window=5000),
        lambda p, t: p["layers"][0].update(window=-3),
        lambda p, t: p["layers"][0].update(window=p["layers"][0]["window"] - 1),
        lambda p, t: p["layers"][0].update(seen="abc"),
        lambda p, t: p["layers"][0].update(seen=199),
        lambda p, t: p["layers"][0].update(seen=200.0),
        lambda p, t: p["layers"][0].update(pages=[]),
        lambda p, t: p["layers"][0].pop("pages"),
        lambda p, t: p["layers"][0].update(starts=[0, 1]),
        lambda p, t: p["layers"][0].update(starts=[0, 10**6]),
        lambda p, t: p["layers"][0].update(starts=[0, -1]),
        lambda p, t: p["layers"][0].update(starts=[0]),
        lambda p, t: p["layers"][0].update(sinks=False),
        lambda p, t: p["layers"][0].update(sinks=1),
        lambda p, t: p["layers"][0]["pages"].update(pages=10**9),
        lambda p, t: p["layers"][0]["pages"].update(pages=[5]),
        lambda p, t: p["layers"][0]["pages"].update(pages=4),
        lambda p, t: p["layers"][0]["pages"].update(pages=0),
        lambda p, t: p["layers"][0]["pages"].update(records=0),
        lambda p, t: p["layers"][0]["pages"].update(records=9),
        lambda p, t: p["layers"][0]["pages"].update(records=10**9),
        lambda p, t: p["layers"][0]["pages"].update(columns=True),
        lambda p, t: p["layers"][0]["pages"].update(columns=0),
        lambda p, t: t["layers.0.pages.table"].fill_(10**6),
        lambda p, t: t["layers.0.pages.table"].fill_(-2),
        lambda p, t: t["layers.0.pages.table"].fill_(-1),
        lambda p, t: t["layers.0.pages.table"][0, 0, 0].fill_(-1),
        lambda p, t: t["layers.0.pages.used"].fill_(33),
        lambda p, t: t["layers.0.pages.used"].fill_(31),
        lambda p, t: t["layers.0.pages.used"].fill_(0),
        lambda p, t: t["layers.0.pages.first"].fill_(0),
        lambda p, t: t["layers.0.pages.first"].add_(1),
        lambda p, t: t["layers.0.pages.first"].sub_(1),
        lambda p, t: t["layers.0.pages.first"].copy_(t["layers.0.pages.first"].flip(1)),
        lambda p, t: t.update({"layers.0.pages.table": t["layers.0.pages.table"].long()}),
        lambda p, t: t.update({"layers.0.pages.table": t["layers.0.pages.table"][..., :-1]}),
        lambda p, t: p["table"].update(shifts=[0, 1]),
        lambda p, t: p["table"].update(shifts=[0, 300]),
        lambda p, t: p["table"].update(shifts=[0, 0]),
        lambda p, t: p["layers"][0].update({"older.0": {}}),
        lambda p, t: p["layers"].__setitem__(0, 3),
        lambda p, t: p.update(layers=[p["layers"][0]]),
        lambda p, t: p.pop("table"),
        lambda p, t: p["table"].update(length=199),
        lambda p, t: p["table"].update(length=10**12),
        lambda p, t: p["table"].update(padded=1),
        lambda p, t: p.update(batch=3),
        lambda p, t: p.update(batch=0),
        lambda p, t: p.update(dtype="float16"),
        lambda p, t: t.update({"table.positions": t["table.positions"].float()}),
        lambda p, t: t.update({"table.positions": t["table.positions"][:, :-1]}),
        lambda p, t: t["table.positions"].fill_(-1),
        lambda p, t: t["layers.0.sinks.columns"].fill_(-1),
        lambda p, t: t["layers.0.sinks.columns"].fill_(10**6),
        lambda p, t: t["layers.0.sinks.columns"].copy_(t["layers.0.sinks.columns"].flip(1)),
        lambda p, t: t.update({"layers.0.pages.records": t["layers.0.pages.records"][..., :0]}),
        lambda p, t: t.update({"layers.0.pages.records": t["layers.0.pages.records"][..., :-1]}),
        lambda p, t: t.update({"layers.0.pages.records": t["layers.0.pages.records"][:4]}),
        lambda p, t: t.update({"layers.0.pages.records": t["layers.0.pages.records"].float()}),
        lambda p, t: t.update({"layers.0.window.keys": t["layers.0.window.keys"].half()}),
        lambda p, t: t.update({"layers.0.window.keys": t["layers.0.window.keys"][:1]}),
        lambda p, t: t.pop("layers.0.window.values"),
        lambda p, t: t.pop("layers.1.sinks.keys"),
        lambda p, t: t.update({"layers.0.older.0.records": t["layers.0.pages.records"]}),
        lambda p, t: t.update({"layers.0.pages.x": t["layers.0.pages.records"]}),
        lambda p, t: t.update({"more": torch.zeros(3)}),
    ],
)
def test_what_no_cache_has_is_refused_whatever_its_digest(change, rightly):
    cache = filled()
    target = filled(tokens=70)
    before = {k: t.clone() for k, t in target.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"^the saved cache [^\n]+$"):
        target.load_state_dict(edited(cache.state_dict(), change, rightly))
    after = target.state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items()), "a refused load must leave the cache as it was"


@pytest.mark.parametrize("name", ["pages.records", "window.values", "sinks.keys"])
def test_no_number_changes_unseen(tmp_path, name):
    cache = filled()

    def flip(p, t):
        t[f"layers.1.{name}"] = t[f"layers.1.{name}"].roll(1, 1)

    def swap(p, t):
        t[f"layers.0.{name}"], t[f"layers.1.{name}"] = t[f"layers.1.{name}"], t[f"layers.0.{name}"]

    for change in (flip, swap):
        with pytest.raises(ArtifactError, match="sha256 differs"):
            new(cache).load_state_dict(edited(cache.state_dict(), change, rightly=False))
        new(cache).load_state_dict(edited(cache.state_dict(), change))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (build("gear", {"bits": 2}), "k.places"),
        (build("zipcache", {}), "k.mask"),
        (build("kitty", {}), "k.mask"),
        (build("vidkv", {}), "v.codes"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_no_place_outside_of_what_it_indexes_is_taken(method, name):
    cache = filled(method, 400)

    (stored,) = [k for k in cache.layers[0].pages.layout.fields if name in k]
    field = cache.layers[0].pages.layout.fields[stored]

    def change(p, t):
        for i in range(2):
            part = t[f"layers.{i}.pages.records"][:, field.offset : field.offset + field.nbytes]
            part.fill_(127 if field.dtype == torch.int8 else 255)

    state = cache.state_dict()
    kind = "keys" if name.startswith("k.") else "values"
    with pytest.raises(ArtifactError, match=rf"edited \(layers\.0\.pages\.records \({kind}\)\)\. Save it again\.$"):
        new(cache).load_state_dict(edited(state, change))


def test_tiers_hold_no_more_than_they_may():
    cache = filled(SAQ(ages=(32, 32)), 400, 1)

    def change(p, t):
        layer = p["layers"][0]
        layer["pages"], layer["older.1"] = layer["older.1"], layer["pages"]

    new(cache).load_state_dict(cache.state_dict())
    with pytest.raises(ArtifactError, match="the saved cache is incomplete or edited"):
        new(cache).load_state_dict(edited(cache.state_dict(), change))


def test_a_layer_s_pages_are_laid_out_as_its_codecs_do_before_anything_is_inflated(tmp_path, monkeypatch):
    cache = filled()
    cache.save(tmp_path / "x", deflate=True)
    monkeypatch.setattr(states, "Layout", SimpleNamespace(of=lambda page, lanes: SimpleNamespace(size=9)))
    inflate = []
    monkeypatch.setattr("kvshrink.store.deflate._inflate", lambda *a: inflate.append(a[1]) or b"")
    with pytest.raises(Exception, match=r".+"):
        new(cache).load(tmp_path / "x")
    assert len(inflate) <= 1, "nothing but the description"


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma2"])
@pytest.mark.parametrize("tokens", [5, 90])
def test_sliding_layers_are_saved_with_the_others_and_checked(tmp_path, family, tokens):
    model = FAMILIES[family].build()
    ids = torch.randint(2, VOCAB, (2, tokens))
    cache = kvshrink.make_cache(model, RTN(window=8))
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    cache.save(tmp_path / "x", deflate=tokens > 50)
    other = kvshrink.make_cache(model, RTN(window=8)).load(tmp_path / "x")
    with torch.inference_mode():
        ours, theirs = (model(input_ids=ids[:, :1], past_key_values=c).logits for c in (cache, other))
    assert torch.equal(ours, theirs)
    state = other.state_dict()
    i = next(i for i, layer in enumerate(other.layers) if not hasattr(layer, "window"))
    for change in (
        lambda p, t: p["layers"][i].update(seen=3),
        lambda p, t: p["layers"][i].update(shape=[1, 2]),
        lambda p, t: p["layers"][i].update(shape=[10**9] * 3),
        lambda p, t: p["layers"][i].update(dtype="int8"),
        lambda p, t: p["layers"][i].update(a=1),
        lambda p, t: t.pop(f"layers.{i}.keys"),
        lambda p, t: t.update({f"layers.{i}.values": t[f"layers.{i}.values"][:, :1]}),
    ):
        with pytest.raises(ArtifactError, match=r"^the saved cache is incomplete or edited [^\n]+$"):
            kvshrink.make_cache(model, RTN(window=8)).load_state_dict(edited(state, change))


def test_a_message_is_one_line_whatever_the_names_in_a_file():
    cache = filled()
    with pytest.raises(ArtifactError, match=r"^[^\n]+$"):
        new(cache).load_state_dict(edited(cache.state_dict(), lambda p, t: t.update({"a\nb": torch.zeros(1)})))
