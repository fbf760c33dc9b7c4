"""An interrupt at any operation on a tensor: the cache is as it was, or as it should become, or refused until reset."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN, KVCache
from kvshrink.errors import CacheError
from tests.scenarios.families import reference, subject
from tests.scenarios.scenarios import tokens

FAMILIES = ("llama", "gemma3")  # all layers compressed; one slides, one is compressed
CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "crop": lambda cache: cache.crop(-2),
    "crop everything": lambda cache: cache.crop(-cache.get_seq_length()),
    "reset": lambda cache: cache.reset(),
}


class Interrupt(TorchDispatchMode):
    """Ctrl-C before the `at`th operation on a tensor."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return function(*args, **(kwargs or {}))


def filled(family: str, cache, count: int = 14):
    """14 tokens: within the sliding window of 16, so that a crop is possible, and beyond a window of 1 and a page."""
    with torch.no_grad():
        (reference if isinstance(cache, DynamicCache) else subject)(family)(tokens(2, count), past_key_values=cache)
    return cache


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(RTN, "page", 8)


def ours(family: str) -> KVCache:
    return kvshrink.make_cache(subject(family), RTN(bits=None, window=1, sinks=2))


def next_logits(model, cache, rows: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(1, 3).expand(rows, -1), past_key_values=cache).logits


def outcomes(family: str, change) -> list[Tensor]:
    """The next step's logits by DynamicCache, without the change and with it."""
    found = []
    for done in (False, True):
        cache = filled(family, DynamicCache(config=reference(family).config))
        if done:
            change(cache)
        empty = cache.get_seq_length() == 0
        rows = 2 if empty else cache.layers[0].keys.shape[0]
        found.append(next_logits(reference(family), cache, rows))
    return found


def interrupted(cache: KVCache, change, at: int) -> bool:
    """Whether the change was cut short before its `at`th operation."""
    try:
        with Interrupt(at):
            change(cache)
    except KeyboardInterrupt:
        return True
    return False


def right_or_refused(family: str, cache: KVCache, wanted: list[Tensor]) -> str:
    rows = cache.rows or 2
    try:
        got = next_logits(subject(family), cache, rows)
    except CacheError as error:
        if "Call reset()" not in str(error):
            raise
        cache.reset()
        fresh = filled(family, cache)
        torch.testing.assert_close(next_logits(subject(family), fresh, 2), wanted[0], atol=1e-4, rtol=0)
        return "refused"
    same = [w.shape == got.shape and bool((w - got).abs().max() < 1e-4) for w in wanted]
    assert any(same), "neither the cache before nor the one after"
    return "right"


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_that_is_interrupted(family, name):
    wanted, start = outcomes(family, CHANGES[name]), filled(family, ours(family))
    at, found = 0, []
    while interrupted(cache := copy.deepcopy(start), CHANGES[name], at):
        found.append(right_or_refused(family, cache, wanted))
        at += 1
    assert right_or_refused(family, cache, wanted[1:]) == "right"
    assert at == 0 or "refused" in found or name == "crop"  # a crop of a row of pages is one operation or none


@pytest.mark.parametrize("into_used", [False, True])
def test_a_load_that_is_interrupted(into_used):
    family = "gemma3"
    state = filled(family, ours(family)).state_dict()
    wanted = outcomes(family, lambda cache: None)
    blank = next_logits(reference(family), DynamicCache(config=reference(family).config), 2)
    for at in (0, 5, 20, 40, 80, 120):
        other = filled(family, ours(family), 9) if into_used else ours(family)
        before = copy.deepcopy(other)
        if not interrupted(other, lambda cache: cache.load_state_dict(state), at):
            assert right_or_refused(family, other, wanted) == "right"
            break
        old = next_logits(subject(family), before, 2) if into_used else blank
        right_or_refused(family, other, [wanted[0], old])


def test_a_save_that_is_interrupted_leaves_cache_and_file(tmp_path):
    family, path = "llama", tmp_path / "cache.safetensors"
    cache = filled(family, ours(family))
    cache.save(path)
    written = path.read_bytes()
    for at in (0, 3, 10):
        assert interrupted(cache, lambda cache: cache.save(path), at)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == written
    assert right_or_refused(family, cache, outcomes(family, lambda cache: None)) == "right"


def test_an_interrupted_cache_is_refused_by_every_operation():
    cache = filled("llama", ours("llama"))
    assert interrupted(cache, CHANGES["reorder"], 12)
    for name in ("reorder", "select", "repeat", "crop"):
        with pytest.raises(CacheError, match=r"interrupted.*Call reset\(\)"):
            CHANGES[name](cache)
    with pytest.raises(CacheError, match="interrupted"):
        cache.state_dict()
    with pytest.raises(CacheError, match="interrupted"):
        next_logits(subject("llama"), copy.deepcopy(cache), 2)
    CHANGES["crop everything"](cache)
    assert right_or_refused("llama", filled("llama", cache), outcomes("llama", lambda cache: None)) == "right"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([[0, 1]])), r"shape \(1, 2\)", id="two_axes"),
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([], dtype=torch.long)), "none of 2 rows", id="none"),
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([0, 2])), "rows 0 to 2", id="beyond"),
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([0.0])), "torch.float32", id="floats"),
        pytest.param(lambda c: c.batch_select_indices("ab"), "not a str", id="text"),
        pytest.param(lambda c: c.reorder_cache(torch.tensor([-3, 0])), "rows -3 to 0", id="negative"),
        pytest.param(lambda c: c.reorder_cache(torch.tensor(1)), r"shape \(\)", id="a_number"),
        pytest.param(lambda c: c.batch_repeat_interleave(0), "from 1 on, not 0", id="no_times"),
        pytest.param(lambda c: c.batch_repeat_interleave(1.5), "not 1.5", id="a_part"),
        pytest.param(lambda c: c.crop(1.5), "not 1.5", id="a_part_of_a_token"),
        pytest.param(lambda c: c.crop(-15), "cannot crop 15 tokens: the cache holds 14", id="too_many"),
        pytest.param(lambda c: c.crop(None), "not None", id="nothing"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_arguments_are_refused_and_change_nothing(family, change, message):
    cache = filled(family, ours(family))
    with pytest.raises(CacheError, match=message):
        change(cache)
    assert right_or_refused(family, cache, outcomes(family, lambda cache: None)) == "right"


def test_rows_may_be_named_from_the_end_or_by_a_mask():
    wanted = filled("llama", DynamicCache(config=reference("llama").config))
    wanted.batch_select_indices(torch.tensor([1]))
    expected = next_logits(reference("llama"), wanted, 1)
    for index in (torch.tensor([-1]), torch.tensor([False, True]), torch.tensor([1], dtype=torch.int32), [1]):
        cache = filled("llama", ours("llama"))
        cache.batch_select_indices(index)
        torch.testing.assert_close(next_logits(subject("llama"), cache, 1), expected, atol=1e-4, rtol=0)


def test_cropped_to_nothing_beyond_the_sliding_window_it_takes_another_batch():
    cache = filled("gemma3", ours("gemma3"), 40)
    with pytest.raises(CacheError, match="sliding window of 16 has let older ones go"):
        cache.crop(-1)
    cache.crop(0)
    cache.crop(-40)
    got = next_logits(subject("gemma3"), cache, 3)
    blank = DynamicCache(config=reference("gemma3").config)
    torch.testing.assert_close(got, next_logits(reference("gemma3"), blank, 3), atol=1e-4, rtol=0)
