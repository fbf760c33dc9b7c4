"""Pages lane by lane: values that share records, read as views or copies, in runs that go when nobody needs them."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvshrink.kernels.records import Layout
from kvshrink.store.bytes import nbytes
from kvshrink.store.choosing import kept, most_important, slots_of
from kvshrink.store.lane_state import restored, state
from kvshrink.store.lanes import Pages, Span
from kvshrink.store.oldest import oldest
from kvshrink.store.pool import Places, Run
from kvshrink.store.rows import joined

PAGE = 4
RECORD = (PAGE + 1) * 4  # codes and a scale of a lane, float32


class Owner:
    """Somebody who holds runs."""


def page_of(*tokens: int, b: int = 2, lanes: int = 1) -> dict[str, torch.Tensor]:
    """Pages whose tensors show which row, lane and token is in them: codes [b, p, G, page], a scale for each page."""
    codes = torch.tensor(tokens, dtype=torch.float32).view(1, -1, 1, PAGE).repeat(b, 1, lanes, 1)
    codes += 1000 * torch.arange(b).view(-1, 1, 1, 1) + 10_000 * torch.arange(lanes).view(-1, 1)
    return {"k.codes": codes, "k.scale": codes[..., 0].clone()}


def first_of(column: int, pages: int, b: int) -> np.ndarray:
    return np.tile(column + PAGE * np.arange(pages), (b, 1))


def filled(*counts: int, b: int = 2, lanes: int = 1) -> Pages:
    """Runs of so many pages each, tokens numbered by column."""
    pages, column = Pages.none(PAGE, lanes), 0
    for count in counts:
        part = page_of(*range(column, column + count * PAGE), b=b, lanes=lanes)
        pages = pages.appended([part], count, first_of(column, count, b))
        column += count * PAGE
    return pages


def read(pages: Pages, tokens: int = 10**6) -> list[list[tuple[list, list]]]:
    """(columns, tokens) of each row and lane, row after row; dead slots are left out."""
    b, lanes = pages.table.shape[:2]
    found: list = [([], []) for _ in range(b * lanes)]
    for start, stop in pages.blocks(tokens):
        codes = pages.records(start, stop)["k.codes"]
        assert codes.shape == (b, stop - start, lanes, PAGE)
        slots = pages.slots[:, :, start * PAGE : stop * PAGE]
        for n, (columns, shown) in enumerate(found):
            row, lane = divmod(n, lanes)
            own, live = codes[row, :, lane].flatten(), slots[row, lane] >= 0
            columns += slots[row, lane][live].tolist()
            shown += own[live].int().tolist()
    return [found[row * lanes : (row + 1) * lanes] for row in range(b)]


def expected(*columns: list[int], lanes: int = 1) -> list[list[tuple[list, list]]]:
    """What rows with these columns show, which are as they were numbered."""
    return [
        [(own, [1000 * row + 10_000 * lane + c for c in own]) for lane in range(lanes)]
        for row, own in enumerate(columns)
    ]


def bytes_of(pages: Pages) -> int:
    return nbytes(pages.tensors())


# --- appended ---


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 12, 1000])
@pytest.mark.parametrize("counts", [(5,), (1, 1, 1, 1, 1), (3, 1, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("lanes", [1, 3])
def test_blocks_cover_every_token_once_in_order(counts, tokens, lanes):
    pages = filled(*counts, lanes=lanes)
    assert read(pages, tokens) == expected(*[list(range(20))] * 2, lanes=lanes)
    sizes = [stop - start for start, stop in pages.blocks(tokens)]
    assert all(size == max(1, tokens // PAGE) for size in sizes[:-1])
    assert pages.span == Span(0, 20)


def test_a_prefill_in_parts_is_one_run():
    pages = filled(1)
    parts = (page_of(*range(at, at + size)) for at, size in ((4, 8), (12, 8), (20, 4)))
    pages = pages.appended(parts, 5, first_of(4, 5, 2))
    assert [len(run.data) for run in pages.runs] == [2, 10]
    assert read(pages) == expected(*[list(range(24))] * 2)


def test_parts_that_are_not_as_many_pages_as_announced():
    with pytest.raises((AssertionError, RuntimeError)):
        filled(1).appended([page_of(*range(8))], 3, first_of(4, 3, 2))


def test_growing_copies_nothing_and_what_was_read_stays():
    pages, seen = Pages.none(PAGE), []
    for page in range(50):
        tokens = range(page * PAGE, page * PAGE + PAGE)
        seen.append((pages, pages.tensors()))
        pages = pages.appended([page_of(*tokens)], 1, first_of(page * PAGE, 1, 2))
    for n, (before, runs) in enumerate(seen):
        assert all(a is b for a, b in zip(runs, pages.tensors()[:n], strict=True))
        assert len(before) == n
        assert n == 0 or read(before) == expected(*[list(range(n * PAGE))] * 2)
    assert bytes_of(pages) == 50 * 2 * RECORD


def test_wider_numbers_come_first_so_that_each_is_aligned():
    stored = {"a": torch.zeros(2, 3, 5, dtype=torch.uint8), "b": torch.zeros(2, 3, 2), "c": torch.zeros(2, 3, 1).half()}
    layout = Layout.of(stored)
    assert list(layout.fields) == ["b", "c", "a"]
    assert [f.offset for f in layout.fields.values()] == [0, 8, 10]
    assert layout.size == 16


def test_rows_may_get_different_numbers_of_pages():
    """Row 1 gets two pages that row 0 does not; then both get one."""
    pages = filled(1)
    more = {k: t[1:] for k, t in page_of(*range(4, 12)).items()}
    pages = pages.appended([more], 2, first_of(4, 2, 1), None, np.array([1]))
    assert pages.counts.tolist() == [[1], [3]]
    assert not pages.even
    assert pages.span is None
    assert read(pages) == expected(list(range(4)), list(range(12)))
    both = pages.appended([page_of(*range(12, 16))], 1, np.array([[12], [12]]), None, None)
    assert both.counts.tolist() == [[2], [4]]
    assert read(both, 4) == expected([*range(4), *range(12, 16)], list(range(16)))
    assert both.addresses(0, 4)[0, 0, 2:].tolist() == [0, 0], "a lane without such a page has no address"
    assert read(pages) == expected(list(range(4)), list(range(12))), "a value stays as it is"


def test_slots_that_are_not_filled_are_not_shown():
    used = np.full((2, 1, 2), PAGE)
    used[:, :, 0] = 3
    pages = Pages.none(PAGE).appended([page_of(0, 1, 2, 99, 3, 4, 5, 6)], 2, np.array([[0, 3]] * 2), used)
    assert read(pages) == expected(*[list(range(7))] * 2)
    assert (pages.full, pages.span, pages.tokens.tolist()) == (False, None, [[7], [7]])


def test_a_gap_between_pages_is_not_taken_for_a_run_of_columns():
    pages = filled(1).appended([page_of(9, 10, 11, 12)], 1, first_of(9, 1, 2))
    assert pages.span is None
    assert read(pages) == expected(*[[0, 1, 2, 3, 9, 10, 11, 12]] * 2)


# --- read as views or copies ---


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_run_is_read_without_a_copy(lanes):
    pages = filled(5, lanes=lanes)
    (whole,) = pages.tensors()
    for start, stop in pages.blocks(8):
        assert pages.bytes_of(start, stop).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_rows_in_another_order_and_the_same_row_twice():
    pages = filled(5, b=3)
    (whole,) = pages.tensors()
    for order, view in (([2], True), ([0, 2], True), ([1, 1, 1], True), ([0, 0, 2], False), ([2, 0], False)):
        own = pages.selected(np.array(order))
        got = own.records()["k.codes"]
        assert torch.equal(got, pages.records()["k.codes"][torch.tensor(order)])
        assert (got.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == view


def test_of_records_in_several_runs_no_more_is_copied_than_is_read():
    """A step that scores the keys alone leaves the values where they are."""
    pages, most = filled(5, 3), 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            most = max(most, out.untyped_storage().nbytes() if func is torch.ops.aten.cat.default else 0)
            return out

    with Largest():
        got = pages.records()["k.scale"]
    assert torch.equal(got, pages.records()["k.codes"][..., 0])
    assert most == got.numel() * 4


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 2)])
def test_several_runs_are_gathered_as_by_a_loop(b, order):
    """A table that names records of several runs in any order."""
    layout = Layout.of({"x": torch.zeros(1, 1, 8, dtype=torch.uint8)})
    runs = [Run.take(6, layout, torch.device("cpu")) for _ in range(3)]
    for n, run in enumerate(runs):
        run.data.copy_(torch.arange(48, dtype=torch.uint8).view(6, 8) + 50 * n)
    table = np.stack([np.stack([runs[n].addresses()[[3, 1, 3]] for n in order])] * b)
    got = Places(runs[::-1]).gather(table)
    want = torch.stack([torch.stack([runs[n].data[[3, 1, 3]] for n in order])] * b)
    assert torch.equal(got, want)


def test_addresses_are_where_the_records_are():
    pages = filled(2, 1, lanes=2)
    for start, stop in ((0, 3), (1, 3), (0, 1)):
        table = pages.addresses(start, stop)
        assert table.flags.c_contiguous
        assert np.array_equal(pages.device_addresses(start, stop).numpy(), table)
    run, record = Places(pages.runs).of(pages.table)
    places = Places(pages.runs).runs
    for (b, lane, p), n in np.ndenumerate(run):
        own = places[n].data[record[b, lane, p]].view(torch.float32)
        assert own[0] == 1000 * b + 10_000 * lane + PAGE * p


# --- cropped, taken, selected, joined ---


@pytest.mark.parametrize("length", range(21))
def test_crop_keeps_what_is_before_the_length(length):
    pages = filled(3, 1, 1)
    cut = pages.cropped(np.array([length, 20]))
    assert read(cut, 8) == expected(list(range(length)), list(range(20)))
    both = pages.cropped(np.array([length, length]))
    assert read(both, 8) == (expected(*[list(range(length))] * 2))
    assert (both.tokens == length).all()
    assert len(both) == -(-length // PAGE)
    assert read(pages) == expected(*[list(range(20))] * 2), "a value stays as it is"


@pytest.mark.parametrize("length", [17, 12, 9, 4, 1, 0])
def test_crop_frees_the_storage_of_whole_pages_of_a_run_of_one_s_own(length):
    holder = Owner()
    pages = filled(5)
    pages.runs[0].holders.add(holder)
    cut = pages.cropped(np.array([length] * 2)).trimmed(holder)
    assert bytes_of(cut) == -(-length // PAGE) * 2 * RECORD
    assert read(cut) == expected(*[list(range(length))] * 2)


def test_crop_that_cuts_no_page_off_copies_nothing():
    holder, pages = Owner(), filled(2, 1)
    for run in pages.runs:
        run.holders.add(holder)
    cut = pages.cropped(np.array([11, 11])).trimmed(holder)
    assert all(a is b for a, b in zip(pages.runs, cut.runs, strict=True))


def test_what_another_one_holds_is_not_trimmed_until_he_lets_go():
    mine, other = Owner(), Owner()
    pages = filled(5, 1)
    for run in pages.runs:
        run.holders.update((mine, other))
    cut = pages.cropped(np.array([8, 8])).trimmed(mine)
    assert cut.runs == pages.runs[:1], "a run of which nothing is named is let go"
    assert bytes_of(cut) == 10 * RECORD
    assert mine not in pages.runs[1].holders
    assert mine in pages.runs[0].holders
    del other
    cut = cut.trimmed(mine)
    assert bytes_of(cut) == 4 * RECORD
    assert read(cut) == expected(*[list(range(8))] * 2)
    assert read(pages) == expected(*[list(range(24))] * 2), "the run itself is not changed"


def test_after_a_crop_into_a_page_the_next_page_starts_anew():
    """Nothing is encoded again: the cut page stays short."""
    pages = filled(3)
    cut = pages.records()["k.codes"][:, 1].clone()
    used = np.full((2, 1, 2), PAGE)
    used[:, :, 0] = 2
    pages = pages.cropped(np.array([6, 6]))
    pages = pages.appended([page_of(6, 7, 98, 99, 8, 9, 10, 11)], 2, np.array([[6, 8]] * 2), used)
    assert torch.equal(pages.records()["k.codes"][:, 1], cut)
    assert pages.first[0].tolist() == [0, 4, 6, 8]
    for tokens in (4, 8, 100):
        assert read(pages, tokens) == expected(*[list(range(12))] * 2)


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (2, 0), (3, 1), (3, 3)])
def test_the_oldest_pages_are_taken(counts):
    old, rest = oldest(filled(2, 1), np.array(counts))
    assert read(old) == expected(*[list(range(n * PAGE)) for n in counts]) or not sum(counts)
    assert read(rest) == expected(*[list(range(n * PAGE, 12)) for n in counts])
    assert (len(old), len(rest)) == (max(counts), 3 - min(counts))


def test_selected_rows_lose_the_columns_of_the_table_that_none_of_them_needs():
    pages = filled(3).cropped(np.array([3, 12]))
    own = pages.selected(np.array([0]))
    assert (len(own), read(own)) == (1, expected(list(range(3))))
    assert read(pages.selected(np.array([1, 0, 1])))[0] == read(pages)[1]
    assert read(pages.selected(np.array([1, 0, 1])))[1] == read(pages)[0]


def test_rows_of_several_are_joined_without_a_copy():
    first, second = filled(3), filled(1, 1, b=1)
    both = joined([first, second, Pages.none(PAGE, 1, 1)])
    assert read(both)[:2] == read(first)
    assert read(both)[2] == read(second)[0]
    assert read(both)[3] == [([], [])]
    assert {id(run) for run in both.runs} == {id(run) for run in (*first.runs, *second.runs)}
    again = joined([first, first])
    assert len(again.runs) == 1
    assert read(again) == read(first) * 2


def test_no_pages():
    pages = Pages.none(PAGE).cropped(np.zeros(0, np.int64))
    assert list(pages.blocks(8)) == []
    assert (len(pages), pages.tokens.sum(), pages.tensors()) == (0, 0, [])
    assert pages.span is None


def test_another_device_holds_the_same():
    pages = filled(2, 1).cropped(np.array([3, 12]))
    assert read(pages.to("cpu")) == read(pages)
    assert all(run.data.device.type == "meta" for run in pages.to("meta").runs)


def test_state_round_trip():
    """Records that are named twice are saved once, those that are not named are not."""
    pages = filled(2, 1, 1).cropped(np.array([14, 3])).selected(np.array([1, 0, 0]))
    values, tensors = state(pages)
    assert (values["pages"], values["records"]) == (4, 5)
    other = restored(Pages.none(PAGE), values, tensors, page_of(0, 1, 2, 3))
    assert read(other, 8) == read(pages, 8)
    other = other.cropped(np.array([3, 3, 3]))
    assert pages.used[1].tolist() == [[4, 4, 4, 2]], "the restored pages must not share their arrays"


def test_pickled_pages_name_their_own_records():
    pages = filled(2, 1).cropped(np.array([3, 12])).selected(np.array([1, 0, 1]))
    text = pickle.dumps(pages)
    wanted = read(pages)
    for run in pages.runs:
        run.data.zero_()
    again = pickle.loads(text)
    assert read(again) == wanted
    assert not set(again.table[again.table > 0].tolist()) & set(pages.table.ravel().tolist())


# --- tokens of each lane's own choice ---


@pytest.mark.parametrize("seed", range(5))
def test_the_most_important_are_those_of_a_loop(seed):
    g = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, 9, (3, 2, 24), generator=g).float()  # with ties, of which the earlier one wins
    importance[torch.rand(3, 2, 24, generator=g) < 0.2] = -torch.inf
    importance[2, 1] = -torch.inf
    counts = torch.randint(0, 25, (3, 2), generator=g)
    index = slots_of(most_important(importance, counts), PAGE)
    longest = 0
    for b in range(3):
        for lane in range(2):
            own = importance[b, lane].tolist()
            order = sorted((t for t in range(24) if own[t] > -np.inf), key=lambda t: (-own[t], t))
            want = sorted(order[: int(counts[b, lane])])
            got = index[b, lane].tolist()
            assert got == want + [-1] * (len(got) - len(want))
            longest = max(longest, len(want))
    assert index.shape[2] == -(-longest // PAGE) * PAGE


def move(stored, slots):
    """Codes of the slots that an index names; the scale is that of the page's first token."""
    codes = stored["k.codes"].movedim(1, 2).flatten(2).gather(2, slots)
    codes = codes.unflatten(2, (-1, PAGE)).movedim(2, 1)
    return {"k.codes": codes, "k.scale": codes[..., 0].clone()}


def chosen(index: list[list[list[int]]], pages: Pages) -> Pages:
    columns = pages.slots
    importance = columns.float() / 2
    own = replace(pages, columns=columns, importance=importance)
    at = torch.tensor(index)
    stays = torch.zeros(columns.shape, dtype=torch.bool).scatter_(2, at.clamp_min(0), at >= 0)
    nothing = columns[..., :0]
    return kept(own, {}, nothing, importance[..., :0], stays, move)


CHOSEN = [[[0, 5, 6, 11], [1, -1, -1, -1]], [[2, 3, 4, -1], [-1] * 4]]


def test_kept_tokens_move_together_into_a_run_of_their_own():
    pages = chosen(CHOSEN, filled(3, lanes=2))
    live = [[[c for c in lane if c >= 0] for lane in row] for row in CHOSEN]
    want = [
        [(own, [1000 * b + 10_000 * lane + c for c in own]) for lane, own in enumerate(row)]
        for b, row in enumerate(live)
    ]
    assert read(pages) == want
    assert pages.used[..., 0].tolist() == [[4, 1], [3, 0]]
    assert pages.counts.tolist() == [[1, 1], [1, 0]]
    assert bytes_of(pages) == 3 * RECORD
    assert pages.span is None
    importance = [[[c / 2 if c >= 0 else -np.inf for c in lane] for lane in row] for row in CHOSEN]
    assert pages.importance.tolist() == importance


def test_kept_tokens_follow_crops_and_rows():
    pages = chosen(CHOSEN, filled(3, lanes=2))
    cut = pages.cropped(np.array([6, 12]))
    assert [[c for c, _ in row] for row in read(cut)] == [[[0, 5], [1]], [[2, 3, 4], []]]
    own = pages.selected(np.array([1, 0, 1]))
    assert [[c for c, _ in row] for row in read(own)] == [[[2, 3, 4], []], [[0, 5, 6, 11], [1]], [[2, 3, 4], []]]
    none = filled(3, lanes=2, b=1).cropped(np.array([0]))
    both = joined([pages, none, chosen([[[7, 8, 9, 10], [0, 1, 2, 3]]], filled(3, lanes=2, b=1))])
    assert [[c for c, _ in row] for row in read(both)[:2]] == [[[0, 5, 6, 11], [1]], [[2, 3, 4], []]]
    assert [[c for c, _ in row] for row in read(both)[2:]] == [[[], []], [[7, 8, 9, 10], [0, 1, 2, 3]]]


def test_bytes_of_the_index():
    pages = filled(3, lanes=2)
    assert pages.index_bytes == 2 * 3 * (4 + 2 * 9)
    slots = pages.slots
    assert pages.index_bytes == 2 * 3 * (4 + 2 * 9) + slots.nbytes, "what has been asked for is held"
    own = chosen(CHOSEN, pages)
    assert own.index_bytes == 2 * (4 + 2 * 9) + 2 * 2 * 4 * 8
