"""store/bytes.py."""

import pytest
import torch

from kvshrink.store.bytes import Held, human, nbytes


def test_storages_are_counted_once_and_whole():
    buffer = torch.zeros(100)
    assert nbytes([buffer.view(10, 10), buffer[50:], buffer[:3]]) == 400
    assert nbytes([buffer[:3].clone()]) == 12
    assert nbytes([torch.zeros(10), torch.zeros(10).bfloat16(), torch.zeros(0)]) == 60
    assert nbytes([]) == 0


def test_held_adds_up():
    one = Held(payload=1, metadata=20, window=300, sinks=4000)
    assert one.total == 4321
    assert one + Held(metadata=5) == Held(payload=1, metadata=25, window=300, sinks=4000)
    assert sum([one, one], Held()).total == 2 * 4321


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_human(count, text):
    assert human(float(count)) == text
