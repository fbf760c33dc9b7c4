"""The bytes of a cache at real layer shapes: promised by arithmetic, counted by the cache, seen by the allocator.

No model is needed: one layer of Llama-3.1-8B (8 KV heads) or Llama-2-7B (32), fed with random keys and values.
"""

import gc

import pytest
import torch
from torch._subclasses import FakeTensor

from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.cache import KVCache
from kvshrink.cache.rope import Rope
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.spectral import Spectral
from kvshrink.methods.quant.rtn import RTN
from tests.cache.build import bases, feed, make

KEEP, HEAD_DIM, QUERY_HEADS = 0.2, 128, 32
MODELS = {"llama31_8b": 8, "llama2_7b": 32}  # KV heads
AT_MOST = {None: 0.205, 4: 0.066}  # share of the full cache at 32k tokens
PEAK = 0.05  # of one layer's full cache, while one token is decoded at 32k
ROPE = Rope(1.0 / 500_000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), 1.0, False)


@pytest.fixture(scope="module", params=MODELS)
def layer(request):
    """(shape, fitted tensors, keys and values of 32k tokens [2, 1, h, t, d]) of one model's layer."""
    shape = LayerShape(MODELS[request.param], HEAD_DIM, torch.bfloat16)
    rank = int(KEEP * shape.width)
    rows = torch.randn(2, 1, shape.heads, 1024, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    return shape, bases(shape, rank, rank), rows.repeat(1, 1, 1, 32, 1)


# 4k tokens show the layer of 32 heads: minutes at 32k where bfloat16 is slow
AT_32K = pytest.mark.parametrize(("layer", "filled"), [("llama31_8b", None), ("llama31_8b", 4)], indirect=True)


@pytest.fixture(scope="module")
def filled(request, layer):
    """(shape, bits, cache after a prefill of 32k tokens, bytes by which live tensors grew meanwhile, one more token)"""
    shape, _, rows = layer
    cache, grown = prefill(layer, request.param, 32768)
    return shape, request.param, cache, grown, rows[0, :, :, :1]


@torch.inference_mode()
def prefill(layer, bits: int | None, tokens: int) -> tuple[KVCache, int]:
    shape, fitted, rows = layer
    before = live()
    cache = make(CSKV(keep=KEEP, bits=bits), shape, [fitted])
    feed(cache, [rows[0, :, :, :tokens]], [rows[1, :, :, :tokens]], ROPE)
    return cache, live() - before


def formula(shape: LayerShape, bits: int | None, tokens: int) -> int:
    """Bytes after one prefill, by hand: pages of 32 beyond a window of 32 in a buffer of 64, and 4 sinks."""
    n, rank, pages = shape.width, int(KEEP * shape.width), (tokens - 32) // 32
    if bits is None:
        page = 32 * 2 * rank * 2
    else:
        page = 32 * 2 * rank * bits // 8 + rank * 4 + 32 * -(-rank // 64) * 4
    return pages * (page + 8 + 1 + 4) + 64 * 2 * n * 2 + 4 * (2 * n * 2 + 4) + 4 * tokens


def live() -> int:
    """Bytes of all tensor storages that anything in this process still refers to."""
    gc.collect()
    # by type, not isinstance: some lazy objects of torch warn when their class is asked for; those that torch.compile
    # traced with in another test have no storage
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), FakeTensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(run) -> int:
    """Most bytes that `run` had allocated at once, temporaries inside of operators included: the running sum of the
    CPU allocator's own events, which the profiler records in order."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    assert events
    return most


@pytest.mark.parametrize("bits", AT_MOST)
def test_bytes_of_4k_tokens(layer, bits):
    cache, grown = prefill(layer, bits, 4096)
    assert cache.nbytes == formula(layer[0], bits, 4096)
    assert grown == pytest.approx(cache.nbytes, rel=0.02)


@AT_32K
def test_bytes_of_32k_tokens(filled, capsys):
    """Scales, window, sinks and positions included."""
    shape, bits, cache, grown, _ = filled
    full = 32768 * shape.token_bytes
    report = cache.report()
    with capsys.disabled():
        print(f"\n{shape.heads} KV heads, 32k tokens, {bits or 16} bits: {100 * report.byte_ratio:.2f} % of full bytes")
    assert report.full == full
    assert cache.nbytes == report.nbytes == formula(shape, bits, 32768)
    assert grown == pytest.approx(cache.nbytes, rel=0.02)
    assert report.byte_ratio <= AT_MOST[bits]
    assert grown / full <= AT_MOST[bits]


@AT_32K
@torch.inference_mode()
def test_peak_of_decoding_at_32k_tokens(filled, capsys):
    """Attention of one new token never holds more than a small part of a full layer, whatever the bits."""
    shape, bits, cache, _, token = filled
    ((keys, values),) = feed(cache, [token], [token], ROPE)
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM).bfloat16()
    most = peak(lambda: attend(query, keys, values, None, HEAD_DIM**-0.5, None, keys._kvshrink))
    share = most / (32768 * shape.token_bytes)
    with capsys.disabled():
        print(f"\n{shape.heads} KV heads, 32k tokens, {bits or 16} bits: attention peaks at {100 * share:.2f} %")
    assert share < PEAK


@pytest.mark.parametrize("layer", ["llama31_8b"], indirect=True)
@torch.inference_mode()
def test_spectral_bits_at_32k_tokens(layer, capsys):
    """Mixed widths in one page: 6.25 % of the body and no full-width copy while a token is decoded."""
    shape, _, rows = layer
    method, before = Spectral(budget=0.0625, allocation="energy"), live()
    groups = shape.width // 16
    widths = torch.tensor([8, 4, 3, 2, 1, *[0] * 11]).repeat_interleave(groups // 16).to(torch.uint8)
    fitted = {}
    for kv in ("key", "value"):
        noise = torch.randn(shape.width, shape.width, generator=torch.Generator().manual_seed(1))
        fitted |= {f"{kv}_up": torch.linalg.qr(noise).Q[None], f"{kv}_mean": torch.zeros(1, shape.width)}
        fitted |= {f"{kv}_variance": torch.ones(shape.width), f"{kv}_widths": widths}
    cache = make(method, shape, [fitted])
    basis = live() - before
    feed(cache, [rows[0]], [rows[1]], ROPE)
    report = cache.report()
    page = 2 * (groups // 16) * sum(32 * 16 * bits // 8 + 2 for bits in (8, 4, 3, 2, 1))
    assert report.held.payload + report.held.metadata == (32768 - 32) // 32 * page
    assert live() - before - basis == pytest.approx(cache.nbytes, rel=0.02)
    ((keys, values),) = feed(cache, [rows[0, :, :, :1]], [rows[1, :, :, :1]], ROPE)
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM).bfloat16()
    most = peak(lambda: attend(query, keys, values, None, HEAD_DIM**-0.5, None, keys._kvshrink))
    share = most / (32768 * shape.token_bytes)
    with capsys.disabled():
        print(
            f"\n{shape.heads} KV heads, 32k tokens, spectral: {100 * report.byte_ratio:.2f} %, peak {100 * share:.2f} %"
        )
    assert report.byte_ratio < 0.085
    assert share < PEAK


@torch.inference_mode()
def test_the_measure_sees_a_full_length_key():
    """What must never happen while decoding, done on purpose: the peak must show it."""
    shape = LayerShape(8, HEAD_DIM, torch.bfloat16)
    cache, rows = make(CSKV(keep=KEEP), shape, [bases(shape, 204, 204)]), torch.randn(2, 1, 8, 4096, 128).bfloat16()
    feed(cache, [rows[0]], [rows[1]], ROPE)
    ((keys, values),) = feed(cache, [rows[0, :, :, :1]], [rows[1, :, :, :1]], ROPE)
    assert peak(lambda: rebuild(keys._kvshrink, keys, values)) > 4096 * shape.token_bytes


def test_a_batch_holds_as_many_times_the_bytes():
    shape = LayerShape(2, 16, torch.float16)
    held = []
    for b in (1, 3):
        cache = make(CSKV(keep=0.5, bits=3), shape, [bases(shape, 16, 16)] * 2)
        rows = torch.randn(b, 2, 300, 16).half()
        feed(cache, [rows, rows], [rows, rows])
        held.append(cache.nbytes)
    assert held[1] == 3 * held[0]


def test_crop_gives_the_bytes_back():
    shape = LayerShape(2, 16, torch.float32)
    cache = make(CSKV(keep=0.5), shape, [bases(shape, 16, 16)])
    rows = torch.randn(1, 2, 3000, 16)
    feed(cache, [rows], [rows])
    before, counted = live(), cache.layers[0].held().total
    cache.crop(-2000)
    freed = counted - cache.layers[0].held().total
    assert freed > 1900 * 2 * 16 * 4
    assert before - live() == pytest.approx(freed, rel=0.02)
    cache.reset()
    assert cache.nbytes == 0


@pytest.mark.parametrize(("bits", "each"), [(None, 32), (4, 5), (2, 3)])
def test_bits_of_a_stored_number_are_those_of_the_body(bits, each):
    """Scales of 32 numbers are a bit each; window, sinks and positions are not in it."""
    shape = LayerShape(2, 64, torch.float32)
    cache = make(RTN(bits=bits), shape, [{}])
    assert cache.report().bits is None
    for tokens in (300, 40):
        feed(cache, [torch.randn(1, 2, tokens, 64)], [torch.randn(1, 2, tokens, 64)])
        report = cache.report()
        assert report.bits == report.to_dict()["bits"] == each
        assert f"{each:.2f} bits a stored number" in str(report)
