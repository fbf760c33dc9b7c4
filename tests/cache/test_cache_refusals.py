"""What would give wrong tokens is refused, in one line, and a refusal changes nothing."""

import json
import re

import pytest
import torch

from kvshrink.cache.attend import attend
from kvshrink.errors import ArtifactError, CacheError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.quant.rtn import RTN
from tests.cache.build import bases, feed, make

SHAPE = LayerShape(2, 8, torch.float32)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def new(layers: int = 2):
    return make(CSKV(keep=0.5, bits=4), SHAPE, [bases(SHAPE, 8, 8)] * layers)


def rows(tokens: int, b: int = 1) -> list[torch.Tensor]:
    return [torch.randn(b, 2, tokens, 8)] * 2


def filled(tokens: int = 200):
    cache = new()
    feed(cache, rows(tokens), rows(tokens))
    return cache


def copy_of(cache):
    return new().load_state_dict(cache.state_dict())


def edited(state: dict, **changes) -> dict:
    """The state with other plain values."""
    plain = json.loads(bytes(state["plain"].tolist())) | changes
    return state | {"plain": torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)}


def positions(tokens: int, b: int = 1) -> torch.Tensor:
    return torch.arange(tokens, dtype=torch.int32).expand(b, tokens)


def shown(cache) -> torch.Tensor:
    """Attention of one more token in the first layer; the cache is not used after this."""
    keys, values = feed(cache, [torch.zeros(1, 2, 1, 8)] * 2, [torch.ones(1, 2, 1, 8)] * 2)[0]
    return attend(torch.ones(1, 2, 1, 8), keys, values, None, 1.0, None, keys._kvshrink)


def test_a_model_that_is_not_attached():
    message = "this cache is used with a model that is not attached. "
    with pytest.raises(CacheError, match=exactly(message + "Call kvshrink.attach(model) first.")):
        new().update(*rows(5), 0)


def test_a_step_that_was_staged_once_counts_once():
    cache = new()
    feed(cache, rows(5), rows(5))
    with pytest.raises(CacheError, match="not attached"):
        cache.update(*rows(5), 0)


def test_another_model():
    message = "this cache was made for another model. "
    with pytest.raises(CacheError, match=exactly(message + "Make one with make_cache(model, ...).")):
        new().stage(0, positions(5), None, None, True, "someother")


def test_another_dtype():
    cache = new()
    cache.stage(0, positions(5), None, None, True, "model")
    message = "the cache was made for torch.float32, the model gives torch.bfloat16. "
    with pytest.raises(CacheError, match=exactly(message + "Make a new cache.")):
        cache.update(rows(5)[0].bfloat16(), rows(5)[0].bfloat16(), 0)


def test_a_step_that_was_interrupted_between_layers():
    cache = new()
    for _ in range(2):  # the second layer never comes
        cache.stage(0, positions(5), None, None, True, "model")
        cache.update(*rows(5), 0)
    message = "this layer holds 0 tokens and the cache 10: a step was interrupted. "
    cache.stage(1, positions(5), None, None, True, "model")
    with pytest.raises(CacheError, match=exactly(message + "Call reset().")):
        cache.update(*rows(5), 1)
    with pytest.raises(CacheError, match=exactly("layers hold 0 to 10 tokens: a step was interrupted. Call reset().")):
        cache.check_whole()
    cache.reset()
    feed(cache, rows(3), rows(3))
    cache.check_whole()


def test_a_step_that_broke_off_before_any_layer_leaves_nothing():
    cache = new()
    cache.stage(0, positions(9) + 100, torch.zeros(1, 9, dtype=torch.bool), None, True, "model")
    feed(cache, rows(9), rows(9))
    assert torch.equal(cache.table.positions, positions(9))


def test_a_crop_of_more_than_there_is():
    cache = filled(60)
    message = "cannot crop 61 tokens: the cache holds 60. "
    with pytest.raises(CacheError, match=exactly(message + "Crop fewer or call reset().")):
        cache.crop(-61)
    assert cache.get_seq_length() == 60
    cache.crop(70)  # the older convention: keep 70, which is all
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 1, r"another version \(1, not 5\)"),
        ("version", True, r"another version \(True, not 5\)"),
        ("fitted", "otherfit", r"another method or artifact \(otherfit, not fitted\)"),
        ("layers", [{}], r"another number of layers \(1, not 2\)"),
    ],
)
def test_a_state_of_something_else(key, value, message):
    state = edited(filled().state_dict(), **{key: value})
    cache = filled(100)
    before = shown(copy_of(cache))
    with pytest.raises(ArtifactError, match=rf"^the saved cache has {message}\. Use what it was made with\.$"):
        cache.load_state_dict(state)
    assert torch.equal(shown(cache), before), "a refused load must leave the cache as it was"


@pytest.mark.parametrize("plain", [None, b"{", b"[]", b"{}"])
def test_a_state_without_description(plain):
    state = filled().state_dict()
    del state["plain"]
    if plain is not None:
        state["plain"] = torch.tensor(list(plain), dtype=torch.uint8)
    with pytest.raises(
        ArtifactError,
        match=r"^not a kvshrink cache state: its description is missing or edited \(.+\)\. Save it again\.$",
    ):
        new().load_state_dict(state)


@pytest.mark.parametrize(
    "missing",
    [
        "table.positions",
        "layers.0.window.keys",
        "layers.1.window.",
        "layers.0.sinks.columns",
        "layers.0.sinks.",
        "layers.1.pages.records",
        "layers.1.pages.used",
        "layers.0.pages.",
    ],
)
def test_an_incomplete_state(missing):
    state = {k: t for k, t in filled().state_dict().items() if not k.startswith(missing)}
    cache = filled(100)
    before = shown(copy_of(cache))
    with pytest.raises(
        ArtifactError, match=rf"^the saved cache is incomplete or edited \({missing}.*\)\. Save it again\.$"
    ):
        cache.load_state_dict(state)
    assert torch.equal(shown(cache), before), "a refused load must leave the cache as it was"


@pytest.mark.parametrize(
    "name", ["table.positions", "layers.0.window.values", "layers.1.pages.records", "layers.1.pages.table"]
)
def test_a_state_of_other_shapes_or_with_more_in_it(name):
    state = filled().state_dict()
    for other in (state | {name: state[name][..., :-1]}, state | {"layers.0.pages.columns": state[name]}):
        with pytest.raises(ArtifactError, match=r"^the saved cache is incomplete or edited \(.+\)\. Save it again\.$"):
            new().load_state_dict(other)


def test_a_state_is_a_copy():
    cache = filled()
    state = cache.state_dict()
    other = new().load_state_dict(state)
    want = shown(copy_of(cache))
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(shown(other), want)


@pytest.mark.parametrize("empty", [lambda c: c.reset(), lambda c: c.crop(-c.get_seq_length())], ids=["reset", "crop"])
def test_an_emptied_cache_takes_another_batch_size(empty):
    cache = make(RTN(), SHAPE, [{}, {}])
    feed(cache, rows(70, b=2), rows(70, b=2))
    empty(cache)
    assert cache.get_seq_length() == 0
    feed(cache, rows(70, b=3), rows(70, b=3))
    assert cache.table.positions.shape == (3, 70)


def test_positions_of_one_row_serve_the_whole_batch():
    """`stage` takes positions [b or 1, s]."""
    cache = make(RTN(), SHAPE, [{}, {}])
    for i in range(2):
        cache.stage(i, positions(70), None, None, True, "model")
        cache.update(*rows(70, b=3), i)
    assert cache.report().full == 2 * 3 * 70 * SHAPE.token_bytes
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(cache.table.positions, positions(70, b=3))
