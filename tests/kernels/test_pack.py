import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.kernels.pack import pack, packed_bytes, unpack
from kvshrink.kernels.pack.reference import WIDTHS

GOLDEN = {  # worked out by hand: 3 bits in a little-endian word, 1, 2 and 4 bits in planes
    1: ([1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0], [0xD3, 0x1A]),
    2: ([1, 2, 3, 0, 0, 1, 2, 3], [0x8D, 0xD2]),
    3: ([1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
    4: ([1, 2, 15, 0, 9, 8, 7, 6], [0x91, 0x82, 0x7F, 0x60]),
    8: ([1, 2, 255, 0, 9, 8, 7, 6], [1, 2, 255, 0, 9, 8, 7, 6]),
}


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(8,), (3, 24), (2, 1, 5, 136), (0, 8)], ids=str)  # not only powers of two
def test_round_trip(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits))
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(codes, before), "pack must not change its input"


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_bytes(bits):
    """Pins the format of saved caches: changing it must break this test."""
    codes, packed = GOLDEN[bits]
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed
    assert unpack(torch.tensor(packed, dtype=torch.uint8), bits).tolist() == codes


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes(bits):
    """Byte j holds codes j, j + m, j + 2m, ... of m bytes, the first in its lowest bits."""
    codes = torch.randint(0, 2**bits, (40,), dtype=torch.uint8)
    m = 5 * bits
    planes = [sum(int(c) << (i * bits) for i, c in enumerate(codes[j::m])) for j in range(m)]
    assert pack(codes, bits).tolist() == planes


def test_three_bits_are_little_endian_words_of_eight_codes():
    codes = torch.randint(0, 8, (40,), dtype=torch.uint8)
    words = [sum(int(c) << (3 * i) for i, c in enumerate(eight)) for eight in codes.split(8)]
    assert bytes(pack(codes, 3).tolist()) == b"".join(word.to_bytes(3, "little") for word in words)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [8, 24, 32 * 51])
def test_every_width_takes_exactly_its_bits(bits, count):
    """3-bit codes take 3 bits, not 4."""
    packed = pack(torch.zeros(count, dtype=torch.uint8), bits)
    assert packed.untyped_storage().nbytes() * 8 == packed_bytes(count, bits) * 8 == count * bits


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("count", "padded"), [(1, 8), (7, 8), (12, 16), (33, 40)])
def test_counts_that_leave_a_gap_are_refused(bits, count, padded):
    with pytest.raises(SettingError, match=rf"^{count} codes .*multiple of 8. Pad to {padded}\.$"):
        pack(torch.zeros(2, count, dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(SettingError, match=rf"^bits={bits} is not offered. Use one of 1, 2, 3, 4, 8\.$"):
        packed_bytes(8, bits)


def test_packing_rows_of_a_view_packs_what_the_view_shows():
    codes = torch.randint(0, 8, (4, 6, 48), dtype=torch.uint8)
    view = codes.transpose(0, 1)[:, 1:3, 8:32]
    assert torch.equal(unpack(pack(view, 3), 3), view)
