import pytest
import torch

from kvshrink.cache.attend import attend
from kvshrink.errors import CacheError, SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.store.growth import slots_for
from tests.cache.build import feed, make

SHAPE = LayerShape(1, 4, torch.float32)


def test_only_sinks_and_recent_tokens_are_attended_to():
    cache = make(StreamingLLM(window=8, sinks=2), SHAPE, [{}])
    rows = torch.randn(1, 1, 101, 4)
    feed(cache, [rows[:, :, :100]], [rows[:, :, :100]])
    ((keys, values),) = feed(cache, [rows[:, :, 100:]], [rows[:, :, 100:]])
    first = 101 - keys.shape[2]
    assert 8 <= keys.shape[2] <= 8 + 32
    query = torch.randn(1, 1, 1, 4)
    kept = torch.cat([rows[:, :, :2], rows[:, :, first:]], 2)
    want = torch.softmax(query @ kept.transpose(2, 3), -1) @ kept
    torch.testing.assert_close(attend(query, keys, values, None, 1.0, None, keys._kvshrink), want)


def test_bytes_do_not_grow():
    cache = make(StreamingLLM(window=8, sinks=2), SHAPE, [{}])
    sizes = []
    for _ in range(300):
        k, v = torch.randn(2, 1, 1, 1, 4)
        feed(cache, [k], [v])
        sizes.append(cache.layers[0].held().total)
    assert sizes[:39] == [min(40, slots_for(n)) * 32 for n in range(1, 40)]  # the buffer
    assert set(sizes[39:]) == {40 * 32 + 2 * (32 + 4)}  # with two sinks and their columns


@pytest.mark.parametrize("held", [80_000.0, 100_000.0, 1_234_567.0])
def test_within_is_the_largest_window_that_fits(held):
    shape = LayerShape(8, 64, torch.bfloat16)

    def most(method: StreamingLLM) -> int:
        return method.layer_bytes(shape, {}, 10**6)

    method = StreamingLLM.within(held, shape)
    assert most(method) <= held < most(StreamingLLM(window=method.window + 1))


def test_within_refuses_a_budget_that_no_window_fits():
    """Silently holding more would give the baseline more bytes than it is compared at."""
    with pytest.raises(SettingError, match=r"30000"):
        StreamingLLM.within(30_000.0, LayerShape(8, 64, torch.bfloat16))


def test_dropped_tokens_cannot_be_taken_back():
    cache = make(StreamingLLM(window=8, sinks=2), SHAPE, [{}])
    rows = torch.randn(1, 1, 200, 4)
    feed(cache, [rows], [rows])
    held = cache.layers[0].window.count
    before = cache.nbytes
    with pytest.raises(CacheError, match=rf"^cannot crop {held + 1} tokens: StreamingLLM holds only the last {held} "):
        cache.crop(-held - 1)
    assert (cache.get_seq_length(), cache.nbytes) == (200, before), "a refused crop changes nothing"
    cache.crop(-held)
    assert cache.get_seq_length() == 200 - held


def test_it_cannot_be_read_by_the_models_own_attention():
    cache = make(StreamingLLM(window=8, sinks=2), SHAPE, [{}])
    rows = torch.randn(1, 1, 60, 4)
    feed(cache, [rows], [rows], own=False)
    with pytest.raises(CacheError, match=r"^StreamingLLM drops tokens, .*'kvshrink'\)\.$"):
        feed(cache, [rows], [rows], own=False)


def test_settings_that_are_refused():
    with pytest.raises(SettingError, match=r"^window=0 is not possible\. Use at least 1 token\.$"):
        StreamingLLM(window=0)
