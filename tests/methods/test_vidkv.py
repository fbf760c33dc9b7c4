import math

import numpy as np
import pytest
import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.vidkv import VidKV, fourier
from tests.methods.affine_oracle import rounded

SHAPE = LayerShape(2, 16, torch.float32)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 63, 64])
def test_the_transform_is_a_real_fourier_transform_of_as_many_numbers(size):
    """The official code stores both parts of a complex one: twice the numbers at a bit each."""
    matrix = fourier(size)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(size), rtol=0, atol=1e-5)
    x = torch.randn(size)
    spectrum, found = np.fft.rfft(x.double().numpy()), (x @ matrix).double().numpy()
    energy = [found[0] ** 2, *(found[2 * k - 1] ** 2 + found[2 * k] ** 2 for k in range(1, (size - 1) // 2 + 1))]
    energy += [found[-1] ** 2] if size % 2 == 0 else []
    weight = np.array([1] + [2] * ((size - 1) // 2) + ([1] if size % 2 == 0 else []))
    np.testing.assert_allclose(energy, np.abs(spectrum) ** 2 / size * weight, rtol=1e-4, atol=1e-5)


def test_keys_by_hand():
    """Wide channels at 2 bits, the rest as the signs of their spectrum times its mean magnitude over the page."""
    rows = torch.randn(1, 2, 64, 16) * (1 + torch.arange(16) % 5)
    key, _ = VidKV().codecs(SHAPE, {})
    back = key.decode(key.encode(rows, None), 2).numpy()
    for head in range(2):
        for page in range(2):
            x = rows[0, head, 32 * page : 32 * page + 32].numpy()
            wide = np.sort(np.argsort(-(x.max(0) - x.min(0)), kind="stable")[:8])
            rest = np.setdiff1d(np.arange(16), wide)
            want = np.empty_like(x)
            want[:, wide] = rounded(x[:, wide].T, 2).T
            spectrum = x[:, rest] @ fourier(8).numpy()
            size = np.abs(spectrum).mean(0).astype(np.float16).astype(np.float32)
            want[:, rest] = np.where(spectrum > 0, size, -size) @ fourier(8).numpy().T
            np.testing.assert_allclose(back[0, head, 32 * page : 32 * page + 32], want, rtol=0, atol=2e-2)


def test_values_are_zero_below_half_the_mean_magnitude_and_plus_or_minus_it_above():
    rows = torch.randn(1, 2, 32, 16) * 3
    _, value = VidKV().codecs(SHAPE, {})
    back = value.decode(value.encode(rows, None), 2)
    size = rows.abs().mean(2, keepdim=True).half().float()
    want = torch.where(rows.abs() < size / 2, 0.0, rows.sign() * size)
    assert float((back - want).abs().gt(1e-3).float().mean()) < 0.01


def test_a_sign_loses_what_the_law_says():
    """1 - 2 / pi of a normal number's energy; the official decoder gives 0 and s, which loses twice as much."""
    rows = torch.randn(1, 1, 3200, 16)
    key, _ = VidKV(wide=0.01).codecs(LayerShape(1, 16, torch.float32), {})  # one channel of 16 is wide
    back = key.decode(key.encode(rows, None), 1)
    signed = back.abs().sum()
    assert signed > 0
    error = float((back - rows).square().mean())
    two_bit = 0.16  # what 2 bits between minimum and maximum of 32 lose, about
    assert error == pytest.approx((15 * (1 - 2 / math.pi) + two_bit) / 16, rel=0.06)


def test_bits_of_a_head_of_128():
    bits = VidKV().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 1024
    keys, values = 0.5 * (2 + 1) + 0.5 * (1 + 0.5) + 1 / 32, 1.6 + 0.5
    assert bits == pytest.approx(keys + values, abs=0.01)
