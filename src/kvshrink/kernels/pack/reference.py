"""The packed format: n codes of `bits` bits in exactly n * bits / 8 bytes, for any n that is a multiple of 8.

1, 2 and 4 bits lie in planes: byte j of m holds codes j, j + m, j + 2m, ..., the first in its lowest bits. So packing
and unpacking move whole runs of bytes. 3 bits are truly 3: each 3 bytes are a little-endian word of 8 codes.
A page has 32 tokens, so a whole page always packs without a gap.
"""

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.shapes import UInt8

WIDTHS = (1, 2, 3, 4, 8)
TRITS = 5  # base-3 codes in a byte: 3^5 = 243, 1.6 bits each


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take. Raises SettingError unless bits is offered and 8 divides count."""
    if bits not in WIDTHS:
        raise SettingError(f"bits={bits} is not offered. Use one of {', '.join(map(str, WIDTHS))}.")
    if count % 8:
        raise SettingError(
            f"{count} codes cannot be packed: the count must be a multiple of 8. Pad to {-(-count // 8) * 8}."
        )
    return count // 8 * bits


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack codes in [0, 2^bits) along the last axis. Larger codes are a caller bug and are not checked here."""
    size = packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes.contiguous()
    if bits == 3:
        eight = codes.unflatten(-1, (-1, 8)).int()
        word = sum(eight[..., i] << (3 * i) for i in range(8))
        return torch.stack([(word >> (8 * j)) & 0xFF for j in range(3)], -1).to(torch.uint8).flatten(-2)
    planes = codes.unflatten(-1, (8 // bits, size))
    packed = planes[..., 0, :].clone()
    for i in range(1, 8 // bits):
        packed |= planes[..., i, :] << (bits * i)
    found: Tensor = packed
    return found


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int) -> UInt8[Tensor, "*rows n"]:
    """Inverse of pack."""
    if bits == 8:
        return packed
    if bits == 3:
        three = packed.unflatten(-1, (-1, 3)).int()
        word = three[..., 0] | (three[..., 1] << 8) | (three[..., 2] << 16)
        return torch.stack([((word >> (3 * i)) & 7).to(torch.uint8) for i in range(8)], -1).flatten(-2)
    # this runs over the whole body in every decode step
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1)


def trit_bytes(count: int) -> int:
    """Bytes that `count` base-3 codes take."""
    return -(-count // TRITS)


def pack_trits(codes: UInt8[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows bytes"]:
    """Pack codes 0, 1, 2 along the last axis, five in a byte: byte j of m holds codes j, j + m, ..., units first."""
    size = trit_bytes(codes.shape[-1])
    padded = torch.nn.functional.pad(codes, (0, size * TRITS - codes.shape[-1]))
    planes = padded.unflatten(-1, (TRITS, size))
    packed = planes[..., TRITS - 1, :].clone()
    for i in reversed(range(TRITS - 1)):
        packed = packed * 3 + planes[..., i, :]
    found: Tensor = packed
    return found


def unpack_trits(packed: UInt8[Tensor, "*rows bytes"], count: int) -> UInt8[Tensor, "*rows n"]:
    """Inverse of pack_trits, of `count` codes."""
    planes = [packed // 3**i % 3 for i in range(TRITS)]
    return torch.cat(planes, -1)[..., :count]
