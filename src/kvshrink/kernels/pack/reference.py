"""The packed format: `bits` bytes hold 8 codes, code i in bits [i * bits, (i + 1) * bits) of that little-endian word.

So 3-bit codes take exactly 3 bits: 8 codes in 3 bytes, none left over, for any number of codes that is a multiple of 8.
A page has 32 tokens, so a whole page always is.
"""

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.shapes import UInt8

WIDTHS = (1, 2, 3, 4, 8)


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
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (size, per_byte))
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int) -> UInt8[Tensor, "*rows n"]:
    """Inverse of pack."""
    if bits == 8:
        return packed
    if bits == 3:
        three = packed.unflatten(-1, (-1, 3)).int()
        word = three[..., 0] | (three[..., 1] << 8) | (three[..., 2] << 16)
        return torch.stack([((word >> (3 * i)) & 7).to(torch.uint8) for i in range(8)], -1).flatten(-2)
    codes = torch.empty(*packed.shape, 8 // bits, dtype=torch.uint8, device=packed.device)
    # written in place: this runs over the whole body in every decode step
    for i in range(8 // bits):
        torch.bitwise_right_shift(packed, bits * i, out=codes[..., i])
    return codes.bitwise_and_(2**bits - 1).flatten(-2)
