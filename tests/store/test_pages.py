import pytest
import torch

from kvshrink.store.bytes import nbytes
from kvshrink.store.pages import JOINED, LONG, Pages

PAGE = 4


def page_of(*tokens: int, b: int = 2) -> dict[str, torch.Tensor]:
    """Pages whose stored tensors show which tokens are in them: codes [b, p, page], one scale per page."""
    codes = torch.tensor(tokens, dtype=torch.float32).view(1, -1, PAGE).repeat(b, 1, 1)
    return {"k.codes": codes, "k.scale": codes[:, :, 0].clone()}


def filled(*extents: int) -> Pages:
    """Pages with extents of so many pages each, tokens numbered by column."""
    pages, column = Pages(PAGE), 0
    for count in extents:
        pages.append([page_of(*range(column, column + count * PAGE))], count, column)
        column += count * PAGE
    return pages


def read(pages: Pages, tokens: int, limit: int | None = None) -> list[tuple[list, list]]:
    """(columns, tokens) of each block; dead slots are left out."""
    out = []
    for block in pages.blocks(tokens, limit):
        shown = block.stored["k.codes"][0].flatten()
        assert block.tokens == len(shown)
        c = block.columns
        columns = torch.arange(c.start, c.stop) if isinstance(c, slice) else c
        out.append((columns[columns >= 0].tolist(), shown[columns >= 0].int().tolist()))
    return out


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 12, 1000])
@pytest.mark.parametrize("extents", [(5,), (1, 1, 1, 1, 1), (3, 1, 1), (1, 4)], ids=str)
def test_blocks_cover_every_token_once_in_order(extents, tokens):
    blocks = read(filled(*extents), tokens)
    assert [c for columns, _ in blocks for c in columns] == list(range(20))
    assert all(columns == shown for columns, shown in blocks)
    assert all(len(columns) == max(1, tokens // PAGE) * PAGE for columns, _ in blocks[:-1])


@pytest.mark.parametrize("limit", range(6))
def test_a_limit_leaves_out_the_newest_pages(limit):
    blocks = read(filled(2, 1, 2), 8, limit)
    assert [c for columns, _ in blocks for c in columns] == list(range(limit * PAGE))


def test_long_extents_are_read_without_a_copy():
    pages = filled(5)
    whole = pages.extents[0]["k.codes"].untyped_storage().data_ptr()
    for block in pages.blocks(8):
        assert block.stored["k.codes"].untyped_storage().data_ptr() == whole
        assert isinstance(block.columns, slice)


def test_a_prefill_in_parts_is_one_extent():
    pages = filled(1)
    parts = (page_of(*range(at, at + size)) for at, size in ((4, 8), (12, 8), (20, 4)))
    pages.append(parts, 5, 4)
    assert [len(e["k.codes"][0]) for e in pages.extents] == [1, 5]
    assert read(pages, 1000) == [(list(range(24)), list(range(24)))]


def test_growing_keeps_extents_few_and_copies_a_page_at_most_twice():
    pages, copies, before = Pages(PAGE), torch.zeros(600, dtype=torch.int), {}
    for page in range(600):
        column = page * PAGE
        pages.append([page_of(*range(column, column + PAGE))], 1, column)
        now, at = {}, 0
        for extent in pages.extents:
            for i in range(extent["k.codes"].shape[1]):
                now[at + i] = extent["k.codes"].untyped_storage().data_ptr()
            at += extent["k.codes"].shape[1]
        copies += torch.tensor([before.get(i, now.get(i)) != now.get(i) for i in range(600)]).int()
        before = now
    assert len(pages.extents) <= 600 // LONG + 2 * JOINED
    assert (int(copies.max()), pages.tokens) == (2, 600 * PAGE)
    assert [c for columns, _ in read(pages, 64) for c in columns] == list(range(600 * PAGE))


@pytest.mark.parametrize("extents", [(5,), (1,) * 5, (40, 1, 1), (20, 16, 3, 2, 17, 1), (1,) * 40], ids=str)
@pytest.mark.parametrize("cut", [0, 1])
def test_runs_cover_all_in_few_blocks_and_never_copy_a_long_extent(extents, cut):
    pages = filled(*extents)
    limit = sum(extents) - cut
    blocks = list(pages.runs(limit))
    shown = [int(t) for b in blocks for t in b.stored["k.codes"][0].flatten()]
    assert shown == list(range(limit * PAGE))
    assert [c for b in blocks for c in range(b.columns.start, b.columns.stop)] == shown
    known = {e["k.codes"].untyped_storage().data_ptr() for e in pages.extents if e["k.codes"].shape[1] >= JOINED}
    assert known <= {b.stored["k.codes"].untyped_storage().data_ptr() for b in blocks}
    assert len(blocks) <= 2 * len(known) + 1


@pytest.mark.parametrize("length", range(21))
def test_crop_keeps_what_is_before_the_length(length):
    pages = filled(3, 1, 1)
    pages.crop(length)
    blocks = read(pages, 8)
    assert [t for _, shown in blocks for t in shown] == list(range(length))
    assert [c for columns, _ in blocks for c in columns] == list(range(length))
    assert pages.tokens == length
    assert len(pages) == -(-length // PAGE)


@pytest.mark.parametrize("length", [17, 12, 9, 4, 1, 0])
def test_crop_frees_the_storage_of_whole_pages(length):
    pages = filled(5)
    pages.crop(length)
    held = nbytes(t for _, t in pages.tensors())
    assert held == -(-length // PAGE) * 2 * (PAGE + 1) * 4  # two rows of codes and a scale, float32


def test_crop_that_cuts_no_page_off_copies_nothing():
    pages = filled(2, 1)
    before = [t for _, t in pages.tensors()]
    pages.crop(11)
    assert all(a is b for a, (_, b) in zip(before, pages.tensors(), strict=True))


def test_after_a_crop_into_a_page_the_next_page_starts_anew():
    """Nothing is encoded again: the cut page stays short."""
    pages = filled(3)
    cut = pages.extents[0]["k.codes"][:, 1].clone()
    pages.crop(6)
    pages.append([page_of(60, 61, 62, 63, 64, 65, 66, 67)], 2, 6)
    assert torch.equal(pages.extents[0]["k.codes"][:, 1], cut)
    assert pages.first == [0, 4, 6, 10]
    for tokens in (4, 8, 100):
        blocks = read(pages, tokens)
        assert [c for columns, _ in blocks for c in columns] == list(range(14))
        assert [t for _, shown in blocks for t in shown] == [0, 1, 2, 3, 4, 5, *range(60, 68)]


def test_a_gap_between_pages_is_not_taken_for_a_run_of_columns():
    pages = filled(1)
    pages.append([page_of(9, 10, 11, 12)], 1, 9)
    assert read(pages, 100) == [([0, 1, 2, 3, 9, 10, 11, 12], [0, 1, 2, 3, 9, 10, 11, 12])]


def test_map_reaches_every_tensor():
    pages = filled(2, 1)
    pages.map(lambda t: t[[1, 0, 1]])
    assert {t.shape[0] for _, t in pages.tensors()} == {3}


def test_state_round_trip():
    pages = filled(2, 1, 1)
    pages.crop(14)
    values, tensors = pages.state()
    other = Pages(PAGE)
    other.restore(values, tensors)
    assert read(other, 8) == read(pages, 8)
    other.crop(3)
    assert pages.used == [4, 4, 4, 2], "the restored pages must not share their lists"


def test_no_pages():
    pages = Pages(PAGE)
    pages.crop(0)
    assert list(pages.blocks(8)) == []
    assert (len(pages), pages.tokens, pages.tensors()) == (0, 0, [])
