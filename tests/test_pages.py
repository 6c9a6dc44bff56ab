"""The page table by itself: who owns what, and what a failure leaves."""

from __future__ import annotations

import pytest

from twilight import OutOfPagesError
from twilight.pages import NULL_PAGE, PageTable


def _state(table: PageTable) -> tuple:
    pages = range(1, table.num_pages + 1)
    rows = [list(row) for row in table.rows]
    return rows, list(table.lengths), table.num_free, [table.owners(page) for page in pages]


def test_pages_are_handed_out_lowest_first_and_come_back() -> None:
    table = PageTable(5, 4, 2)
    assert table.extend([5, 4]).copies == []
    assert table.rows == [[1, 2], [3]] and table.lengths == [5, 4] and table.num_free == 2
    table.free(0)
    assert table.num_free == 4 and table.rows[0] == []
    table.extend([0, 1])
    assert table.rows[1] == [3, 1]
    assert NULL_PAGE not in table.rows[1]


def test_only_a_tail_that_is_shared_and_not_full_is_copied() -> None:
    table = PageTable(8, 4, 3)
    table.extend([6, 0, 0])
    table.fork(0, 1)
    table.fork(0, 2)
    assert [table.owners(page) for page in (1, 2)] == [3, 3] and table.num_free == 6
    assert table.pages_needed([1, 1, 1]) == 2  # the last owner to write keeps the page
    assert table.extend([1, 1, 1]).copies == [(2, 3), (2, 4)]
    assert table.rows == [[1, 3], [1, 4], [1, 2]]
    table.extend([1, 0, 0])  # now full
    table.fork(0, 1)
    assert table.extend([1, 1, 0]).copies == []
    assert table.rows[0][:2] == table.rows[1][:2] == [1, 3] and table.rows[0][2] != table.rows[1][2]


def test_out_of_pages_leaves_everything_as_it_was() -> None:
    table = PageTable(3, 4, 2)
    table.extend([6, 0])
    table.fork(0, 1)
    before = _state(table)
    message = "out of pages: 8 new tokens need 3 pages of 4 tokens, 1 of 3 are free"
    with pytest.raises(OutOfPagesError, match=message):
        table.extend([3, 5])
    assert _state(table) == before
    table.extend([1, 1])  # what fits still goes


def test_truncate_copies_a_page_cut_under_another_owner() -> None:
    table = PageTable(4, 4, 2)
    table.extend([7, 0])
    table.fork(0, 1)
    assert table.truncate(0, 7).copies == [] and table.rows[0] == [1, 2]
    assert table.truncate(0, 6).copies == [(2, 3)]
    assert table.rows == [[1, 3], [1, 2]] and table.lengths == [6, 7]
    assert table.truncate(0, 4).copies == [] and table.num_free == 2
    assert table.truncate(1, 5).copies == []  # nobody else holds that page any more
    assert table.truncate(0, 0).copies == [] and table.rows[0] == []


def test_truncate_without_a_free_page_leaves_everything_as_it_was() -> None:
    table = PageTable(2, 4, 2)
    table.extend([8, 0])
    table.fork(0, 1)
    before = _state(table)
    with pytest.raises(OutOfPagesError, match="truncating row 0 inside a shared page needs one free page"):
        table.truncate(0, 7)
    assert _state(table) == before
    assert table.truncate(0, 4).copies == []  # a whole page needs no copy


def test_truncate_may_reuse_a_page_that_it_drops() -> None:
    table = PageTable(3, 4, 2)
    table.extend([8, 0])
    table.fork(0, 1)
    table.extend([0, 4])
    assert table.rows[1] == [1, 2, 3] and table.num_free == 0
    assert table.truncate(1, 7).copies == [(2, 3)]
    assert table.rows == [[1, 2], [1, 3]] and table.num_free == 0


def test_select_reorders_repeats_and_drops() -> None:
    table = PageTable(6, 4, 3)
    table.extend([5, 1, 9])
    first, last = list(table.rows[0]), list(table.rows[2])
    table.select([2, 2, 0, 2])
    assert table.rows == [last, last, first, last] and table.lengths == [9, 9, 5, 9]
    assert [table.owners(page) for page in last] == [3, 3, 3] and [table.owners(page) for page in first] == [1, 1]
    assert table.num_free == 1
    table.select([2])
    assert table.rows == [first] and table.num_free == 4


def test_fork_frees_the_target_and_onto_itself_does_nothing() -> None:
    table = PageTable(4, 4, 2)
    table.extend([4, 8])
    table.fork(0, 0)
    assert table.rows[0] == [1]
    table.fork(0, 1)
    assert table.rows == [[1], [1]] and table.num_free == 3 and table.owners(1) == 2


def test_grow_adds_pages_behind_the_last() -> None:
    table = PageTable(1, 4, 1)
    table.extend([4])
    table.grow(3)
    table.extend([8])
    assert table.rows == [[1, 2, 3]] and table.num_free == 0
    table.grow(2)
    assert table.num_pages == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.extend([1]), ValueError, "new_tokens: expected 2 counts, one a row, got 1"),
        (lambda t: t.extend([1, -1]), ValueError, "new_tokens: expected counts of at least 0, got -1"),
        (lambda t: t.extend([1, 1.0]), TypeError, "new_tokens: expected ints, got float"),
        (lambda t: t.free(2), ValueError, "row: expected a row from 0 to 1, got 2"),
        (lambda t: t.fork(0, -1), ValueError, "target: expected a row from 0 to 1, got -1"),
        (lambda t: t.fork(5, 0), ValueError, "source: expected a row from 0 to 1, got 5"),
        (lambda t: t.select([0, 2]), ValueError, "rows: expected a row from 0 to 1, got 2"),
        (lambda t: t.truncate(0, 7), ValueError, "length: expected 0 to 6 for row 0, got 7"),
        (lambda t: t.truncate(0, -1), ValueError, "length: expected 0 to 6 for row 0, got -1"),
    ],
)
def test_refusals_change_nothing(call, error: type[Exception], message: str) -> None:
    table = PageTable(4, 4, 2)
    table.extend([6, 0])
    table.fork(0, 1)
    before = _state(table)
    with pytest.raises(error, match=message):
        call(table)
    assert _state(table) == before
