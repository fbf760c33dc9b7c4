import torch

from kvshrink.store.growth import slots_for
from kvshrink.store.tokens import CHUNK, TokenTable


def run(start: int, count: int, b: int = 2) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.int32).expand(b, count)


def test_positions_are_kept_column_by_column():
    table = TokenTable()
    table.append(run(0, 5), None)
    table.append(run(5, 1), None)
    assert table.length == 6
    assert torch.equal(table.positions, run(0, 6))
    assert table.positions.dtype == torch.int32
    assert not table.padded


def test_pads_have_position_minus_one():
    table = TokenTable()
    real = torch.tensor([[True, True, True], [False, False, True]])
    table.append(torch.tensor([[0, 1, 2], [1, 1, 0]], dtype=torch.int32), real)
    table.append(torch.tensor([[3], [1]], dtype=torch.int32), None)
    assert table.padded
    assert table.positions.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]


def test_it_grows_by_a_quarter_at_most_and_keeps_what_it_had():
    table = TokenTable()
    for start in range(0, 3 * CHUNK, 100):
        table.append(run(start, 100), None)
        (held,) = table.tensors()
        assert held.shape[1] == slots_for(table.length, CHUNK)
        assert torch.equal(table.positions, run(0, table.length))


def test_four_bytes_a_token_and_row():
    table = TokenTable()
    table.append(run(0, 4 * CHUNK), None)
    assert sum(t.untyped_storage().nbytes() for t in table.tensors()) == 2 * 4 * 4 * CHUNK


def test_crop_then_append_overwrites():
    table = TokenTable()
    table.append(run(0, 10), None)
    table.crop(4)
    table.append(run(100, 3), None)
    assert table.positions[1].tolist() == [0, 1, 2, 3, 100, 101, 102]
    table.crop(50)
    assert table.length == 7, "a crop never makes it longer"


def test_rows_follow_batch_operations():
    table = TokenTable()
    table.select(torch.tensor([0]))  # nothing is there yet
    table.append(torch.tensor([[0, 1], [5, 6]], dtype=torch.int32), None)
    table.select(torch.tensor([1, 1, 0]))
    assert table.positions.tolist() == [[5, 6], [5, 6], [0, 1]]


def test_reset_forgets_rows_and_pads():
    table = TokenTable()
    table.append(run(0, 3), torch.tensor([[True] * 3, [False, True, True]]))
    table.reset()
    assert (table.length, table.padded, table.tensors()) == (0, False, [])
    table.append(run(0, 2, b=5), None)
    assert table.positions.shape == (5, 2)


def test_state_round_trip():
    table = TokenTable()
    table.append(run(0, 3), torch.tensor([[True] * 3, [False, True, True]]))
    other = TokenTable()
    other.restore(*table.state())
    assert torch.equal(other.positions, table.positions)
    assert other.padded
    empty = TokenTable()
    empty.restore(*TokenTable().state())
    assert (empty.length, empty.tensors()) == (0, [])


def test_joined_rows_end_together_and_are_alone_again_as_they_were():
    long, short = TokenTable(), TokenTable()
    long.append(run(0, 5), torch.tensor([[True] * 5, [False, True, True, True, True]]))
    short.append(run(7, 2, b=1), None)
    both = TokenTable.joined([long, short])
    assert both.positions.tolist() == [[0, 1, 2, 3, 4], [-1, 1, 2, 3, 4], [-1, -1, -1, 7, 8]]
    assert (both.shifts.tolist(), both.lengths.tolist(), both.padded) == ([0, 0, 3], [5, 5, 2], True)
    assert both.pads.tolist() == [[False] * 5, [True] + [False] * 4, [True] * 3 + [False] * 2]
    for i, (positions, padded) in enumerate((([0, 1, 2, 3, 4], False), ([-1, 1, 2, 3, 4], True), ([7, 8], False))):
        alone = both.row(i)
        assert (alone.positions.tolist(), alone.padded, alone.shifts) == ([positions], padded, None)
    again = TokenTable()
    again.restore(*both.state())
    assert again.shifts.tolist() == [0, 0, 3]
    both.select(torch.tensor([1, 0]))
    assert both.shifts is None
