"""What all packings share: the fake-quantised value is the stored one, bit for bit; gradients pass straight through."""

import pytest
import torch

from kvshrink.kernels.pack import pack_trits, trit_bytes, unpack_trits
from kvshrink.methods._packing import Affine, Codebook, Raw
from kvshrink.methods._packing.by_channel import ByChannel, Rotated
from kvshrink.methods._packing.float8 import Float8
from kvshrink.methods._packing.mixed import Mixed
from kvshrink.methods.quant.vidkv import fourier

THREE, SIXTEEN = torch.tensor([-1.0, 0.0, 1.0]), torch.arange(-8, 8).float()
PACKINGS = {
    "raw": Raw(2, 20, 32, torch.float32),
    "mixed": Mixed((16, 4), (3, 2), 32),
    "trellis": Mixed((16, 4), (3, 2), 32, form="trellis"),
    "float8": Float8(2, 20, 32),
    "by channel": ByChannel(Affine(2, 8, 32, 4, "channel"), Affine(2, 12, 32, 2, "channel"), "size"),
    "rotated": Rotated(Affine(2, 20, 32, 3, "token", 8), fourier(20)),
}
PACKINGS |= {f"affine {b} {a}": Affine(2, 20, 32, b, a, 8, 0.9) for b in (1, 2, 3, 4, 8) for a in ("channel", "token")}
PACKINGS["affine float8"] = Affine(2, 20, 32, 3, "token", 8, 0.9, "float8")
for scale in ("absmax", "rms", "mean", "range", "one"):
    for stored_as in ("float16", "float8", "nested") + (("power",) if scale == "absmax" else ()):
        for axis in ("channel", "token", "page"):
            size = 10 if scale in ("rms", "mean") else 8  # a ragged last group is for what looks at its ends alone
            PACKINGS[f"{scale} {stored_as} {axis}"] = Codebook(2, 20, 32, SIXTEEN, axis, size, scale, stored_as)
PACKINGS["trits"] = Codebook(2, 20, 32, THREE, "token", 5, "mean")


@pytest.fixture(params=PACKINGS, ids=str)
def packing(request):
    return PACKINGS[request.param]


def rows(packing) -> torch.Tensor:
    groups = getattr(packing, "groups", 1) if not isinstance(packing, Mixed) else 1
    return torch.randn(2, groups, 96, 20) * 3 + 1


def test_the_fake_value_is_the_stored_one_bit_for_bit(packing):
    x = rows(packing)
    assert torch.equal(packing.fake_quantize(x), packing.load(packing.store(x, None)))


def test_gradients_pass_straight_through(packing):
    x = rows(packing).requires_grad_()
    packing.fake_quantize(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * packing.fake_quantize(x).detach())


def test_bytes_are_those_promised_and_side_information_is_named(packing):
    stored = packing.store(rows(packing), None)
    assert sum(t.nbytes for t in stored.values()) == 2 * 3 * packing.page_bytes()
    assert packing.metadata <= set(stored)


def test_leading_channels_and_picked_tokens_are_those_of_the_whole(packing):
    stored = packing.store(rows(packing), None)
    whole, tokens = packing.load(stored), torch.tensor([[5, 95, 0], [33, 33, 64]])
    assert torch.equal(packing.lead(stored, 7), whole[..., :7])
    assert torch.equal(packing.pick(stored, tokens), torch.stack([w[:, t] for w, t in zip(whole, tokens, strict=True)]))


@pytest.mark.parametrize("count", [1, 4, 5, 6, 640, 4096])
def test_five_trits_lie_in_a_byte(count):
    codes = torch.randint(0, 3, (3, count)).to(torch.uint8)
    packed = pack_trits(codes)
    assert packed.shape == (3, trit_bytes(count)) == (3, -(-count // 5))
    assert torch.equal(unpack_trits(packed, count), codes)
    size = trit_bytes(count)
    first = [int(codes[0, i * size]) if i * size < count else 0 for i in range(5)]
    assert int(packed[0, 0]) == sum(code * 3**i for i, code in enumerate(first))
