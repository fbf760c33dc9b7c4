"""How many heads share a key basis: the published roofline table, and what must hold on any device."""

import dataclasses

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.kernels.ceilings import Ceilings
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank import cskv
from kvshrink.methods.lowrank._groups import Cost, heads_per_basis, hidden
from kvshrink.methods.lowrank.cskv import CSKV

H200, A100, RTX4090 = Ceilings(989e12, 4.8e12), Ceilings(312e12, 2.04e12), Ceilings(165e12, 1.008e12)  # data sheets
LLAMA2 = LayerShape(32, 128, torch.bfloat16)
LLAMA3 = LayerShape(8, 128, torch.bfloat16)
BITS = {None: 16, 4: 5}  # of a stored latent, scales included, as the table counts them


def cost(shape, share, size, bits):
    rank = int(share * shape.width * size / shape.heads)
    return Cost(shape.width, rank, 2 * share * shape.width * BITS[bits] / 8)


def device(**changes):
    return H200._replace(**changes)


@pytest.mark.parametrize(
    ("ceilings", "shape", "share", "size", "rank", "speed_up", "speed_up_int4"),
    [
        (H200, LLAMA2, 0.5, 32, 2048, 0.20, 0.20),
        (H200, LLAMA2, 0.2, 32, 819, 0.50, 0.50),
        (H200, LLAMA2, 0.2, 4, 102, 3.97, 3.97),
        (H200, LLAMA2, 0.2, 1, 25, 5.0, 15.7),
        (H200, LLAMA3, 0.5, 8, 512, 0.77, 0.77),
        (H200, LLAMA3, 0.5, 2, 128, 2.0, 3.0),
        (H200, LLAMA3, 0.2, 8, 204, 1.92, 1.92),
        (H200, LLAMA3, 0.2, 4, 102, 3.77, 3.77),
        (A100, LLAMA3, 0.2, 4, 102, 2.8, 2.8),
        (RTX4090, LLAMA3, 0.2, 4, 102, 3.0, 3.0),
        (H200, LLAMA3, 0.2, 2, 51, 5.0, 7.3),
    ],
)
def test_the_roofline_table(ceilings, shape, share, size, rank, speed_up, speed_up_int4):
    """Speed-ups over a full 16-bit cache: where keys cost nothing they are what the bytes alone give."""
    for bits, faster in ((None, speed_up), (4, speed_up_int4)):
        at = cost(shape, share, size, bits)
        assert at.rank == rank
        by_bytes = 16 / (share * BITS[bits])
        assert hidden(at, ceilings) == (faster > 0.97 * by_bytes)
        # and where they do, the rebuild alone explains the speed-up, but for a tenth of absorbed products
        if not hidden(at, ceilings):
            alone = 4 * shape.width / ceilings.bandwidth / (2 * shape.width * rank / ceilings.flops)
            assert faster <= alone * 1.01
            assert faster == pytest.approx(alone, rel=0.13)


@pytest.mark.parametrize(("shape", "share"), [(s, k) for s in (LLAMA2, LLAMA3) for k in (0.5, 0.2)])
@pytest.mark.parametrize(("bits", "size"), [(None, 2), (4, 1)])
def test_what_the_table_chooses(shape, share, bits, size):
    assert chosen(shape, share, bits, H200) == size


def chosen(shape, share, bits, ceilings):
    return heads_per_basis([shape.heads], lambda size: [cost(shape, share, size, bits)], ceilings)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 32])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_divisor_that_grows_with_flops_and_shrinks_with_bandwidth(heads, bits):
    shape, powers = LayerShape(heads, 64, torch.bfloat16), [4.0**i for i in range(-8, 9)]
    by_flops = [chosen(shape, 0.2, bits, device(flops=989e12 * x)) for x in powers]
    by_bandwidth = [chosen(shape, 0.2, bits, device(bandwidth=4.8e12 * x)) for x in powers]
    assert by_flops == sorted(by_flops)
    assert by_bandwidth == sorted(by_bandwidth, reverse=True)
    assert {heads % s for s in by_flops + by_bandwidth} == {0}
    assert (by_flops[0], by_flops[-1]) == (1, heads)
    assert (by_bandwidth[0], by_bandwidth[-1]) == (heads, 1)


def test_layers_of_different_heads_share_a_divisor_that_is_hidden_in_all():
    small, large = LayerShape(4, 64, torch.bfloat16), LayerShape(12, 64, torch.bfloat16)
    both = heads_per_basis([4, 12], lambda s: [cost(x, 0.2, s, None) for x in (small, large)], device(flops=1e20))
    assert both == 4
    # a second layer whose rebuild is never hidden
    slow = heads_per_basis([8, 8], lambda s: [cost(LLAMA3, 0.2, s, None), Cost(1024, 10**6, 1.0)], H200)
    assert slow == 1


def test_sizes_that_leave_a_group_without_a_latent_are_passed_over(on):
    on(device(flops=1.0))
    assert CSKV(keep=0.005, group_heads="auto").resolve_auto([LLAMA3], torch.device("cpu")).group_heads == 2
    with pytest.raises(SettingError, match=r"gives key rank 0 .* Use keep of at least"):
        CSKV(keep=1e-4, group_heads="auto").resolve_auto([LLAMA3], torch.device("cpu"))


# --- the method ---


@pytest.fixture
def on(monkeypatch):
    """A function that lets a device have these ceilings."""
    return lambda ceilings: monkeypatch.setattr(cskv, "measure", lambda device, dtype: ceilings)


@pytest.mark.parametrize(
    ("ceilings", "shapes", "settings", "size"),
    [
        (H200, [LLAMA3], {"keep": 0.5}, 2),
        (H200, [LLAMA3], {"keep": 0.2}, 2),  # 51 latents: 104 kFLOP, 816 bytes
        (H200, [LLAMA3], {"keep": 0.2, "bits": 4}, 1),
        (H200, [LLAMA2], {"keep": 0.2}, 2),
        (H200, [LLAMA3, LLAMA2], {"keep": 0.2}, 2),
        (H200, [LLAMA3], {"keep": 0.2, "key_share": 0.2}, 8),  # 81 latents: 166 kFLOP, still 816 bytes
        (device(flops=1e20), [LLAMA3], {"bits": 4}, 8),
        (device(flops=1e20), [LLAMA3, LayerShape(6, 128, torch.bfloat16)], {"bits": 4}, 2),
        (device(flops=1e3), [LLAMA3], {}, 1),
    ],
)
def test_auto_becomes_a_number(on, ceilings, shapes, settings, size):
    on(ceilings)
    method = CSKV(group_heads="auto", **settings)
    resolved = method.resolve_auto(shapes, torch.device("cpu"))
    assert resolved == dataclasses.replace(method, group_heads=size)
    assert resolved.resolve_auto(shapes, torch.device("cpu")) is resolved


@pytest.mark.parametrize("given", [None, 1, 4])
def test_what_is_given_stays_and_nothing_is_measured(monkeypatch, given):
    monkeypatch.delattr(cskv, "measure")
    method = CSKV(group_heads=given)
    assert method.resolve_auto([LLAMA3], torch.device("cpu")) is method


def test_the_number_of_a_real_device_is_a_divisor():
    assert CSKV(group_heads="auto").resolve_auto([LLAMA3], torch.device("cpu")).group_heads in (1, 2, 4, 8)


def test_auto_promises_nothing_before_it_is_settled():
    method = CSKV(group_heads="auto")
    fitted = {"key_mean": torch.zeros(8, 128), "value_mean": torch.zeros(1, 1024)}
    asks = [method.ranks, method.groups, lambda x: method.bits_per_token(x, {}), lambda x: method.cut(fitted, {})]
    for ask in asks:
        with pytest.raises(SettingError, match=r"^group_heads='auto' is a number only after `fit`\. Fit the method"):
            ask(LLAMA3)
